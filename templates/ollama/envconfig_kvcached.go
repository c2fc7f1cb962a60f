package envconfig

import "github.com/ollama/ollama/kvcached"

// addKVCached registers the settings that act, with the values in effect. Every subcommand calls this, so that a bad value
// is no error here: it is shown as it was given, and `ollama serve` refuses it.
func addKVCached(vars map[string]EnvVar) {
	settings, err := kvcached.LoadSettings()
	var enabled, limit any = settings.Enabled, settings.LimitText()
	if err != nil {
		enabled, limit = Var(kvcached.EnabledVariable), Var(kvcached.MemoryVariable)
	}
	vars[kvcached.EnabledVariable] = EnvVar{kvcached.EnabledVariable, enabled, "Map KV cache memory only where it is in use, within one limit for all models (default false)"}
	vars[kvcached.MemoryVariable] = EnvVar{kvcached.MemoryVariable, limit, "Memory that all loaded models may hold together, e.g. 20, 1.5GB or 16GiB (default: no limit)"}
}
