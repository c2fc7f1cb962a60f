package envconfig

import "github.com/ollama/ollama/kvcached"

// addKVCached registers the settings with the values in effect. Every subcommand calls this, so that a bad value is no error
// here: all are then shown as they were given, and `ollama serve` refuses them.
func addKVCached(vars map[string]EnvVar) {
	settings, err := kvcached.LoadSettings()
	for _, setting := range settings.Show() {
		value := setting.Value
		if err != nil {
			value = Var(setting.Variable)
		}
		vars[setting.Variable] = EnvVar{setting.Variable, value, setting.Description}
	}
}
