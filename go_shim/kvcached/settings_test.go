package kvcached

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDefaults(t *testing.T) {
	want := Settings{Limit: NoLimit}
	for name, config := range map[string]string{
		"no home":       "",
		"no file":       filepath.Join(t.TempDir(), "config.yaml"),
		"empty file":    write(t, ""),
		"only comments": write(t, "# nothing here\n"),
		"null":          write(t, "~\n"),
		"others' keys":  write(t, "theme: dark\neditor: {tabs: 4}\n"),
		"empty section": write(t, "kvcached:\n"),
	} {
		got, err := ReadSettings([]string{"HOME=/x", "OLLAMA_HOST=a", "OLLAMA_KVCACHED_SOCKET="}, config)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestEnvironmentOverFile(t *testing.T) {
	config := write(t, "other: 1\nkvcached:\n  enabled: yes\n  memory_limit: 20GB\n")

	got, err := ReadSettings(nil, config)
	if want := (Settings{true, 20e9, config + " line 4 (kvcached.memory_limit)"}); err != nil || got != want {
		t.Errorf("file: %+v, %v; want %+v", got, err, want)
	}

	got, err = ReadSettings([]string{"OLLAMA_KVCACHED_MEMORY_GB=1.5GiB", `OLLAMA_KVCACHED_ENABLED="Off"`}, config)
	if want := (Settings{false, 3 << 29, MemoryVariable}); err != nil || got != want {
		t.Errorf("both: %+v, %v; want %+v", got, err, want)
	}

	// An empty variable is an unset one.
	got, err = ReadSettings([]string{"OLLAMA_KVCACHED_ENABLED="}, config)
	if err != nil || !got.Enabled {
		t.Errorf("empty variable: %+v, %v", got, err)
	}
}

func TestBool(t *testing.T) {
	for value, want := range map[string]bool{
		"1": true, "true": true, "TRUE": true, "Yes": true, "on": true,
		"0": false, "false": false, "no": false, "OFF": false,
	} {
		got, err := ReadSettings([]string{EnabledVariable + "=" + value}, "")
		if err != nil || got.Enabled != want {
			t.Errorf("%s: %+v, %v", value, got, err)
		}
	}
}

func TestBadSettings(t *testing.T) {
	for _, test := range []struct {
		name    string
		environ []string
		config  string
		want    []string // in the error
	}{
		{"bool", []string{"OLLAMA_KVCACHED_ENABLED=maybe"}, "", []string{"OLLAMA_KVCACHED_ENABLED: ", `"maybe"`, "yes or on"}},
		{"bool number", []string{"OLLAMA_KVCACHED_ENABLED=2"}, "", []string{`"2"`}},
		{"size", []string{"OLLAMA_KVCACHED_MEMORY_GB=lots"}, "", []string{"OLLAMA_KVCACHED_MEMORY_GB: ", `"lots"`, "20GB"}},
		{"zero", []string{"OLLAMA_KVCACHED_MEMORY_GB=0"}, "", []string{"leave the setting out"}},
		{"misspelt", []string{"OLLAMA_KVCACHED_ENABLE=1"}, "", []string{"OLLAMA_KVCACHED_ENABLE: ", "did you mean OLLAMA_KVCACHED_ENABLED?"}},
		{"misspelt unit", []string{"OLLAMA_KVCACHED_MEMORY=1"}, "", []string{"did you mean OLLAMA_KVCACHED_MEMORY_GB?"}},
		{"lower case", []string{"ollama_kvcached_enabled=1"}, "", []string{"ollama_kvcached_enabled: ", "did you mean OLLAMA_KVCACHED_ENABLED?"}},
		{"unknown", []string{"OLLAMA_KVCACHED_XYZZY_PLUGH=1"}, "", []string{"there are OLLAMA_KVCACHED_ENABLED and OLLAMA_KVCACHED_MEMORY_GB"}},
		{"reserved", []string{"OLLAMA_KVCACHED_SOCKET=/run/x"}, "", []string{"OLLAMA_KVCACHED_SOCKET: ", "not acted on by this build"}},
		{"reserved key", nil, "kvcached:\n  enabled: true\n  idle_seconds: 5\n", []string{"line 3 (kvcached.idle_seconds)", "not acted on by this build"}},
		{"unknown key", nil, "kvcached:\n  memory_limt: 20GB\n", []string{"line 2 (kvcached.memory_limt)", "did you mean memory_limit?"}},
		{"no unit", nil, "kvcached:\n  memory_limit: 20\n", []string{"line 2", "20GB"}},
		{"no value", nil, "kvcached:\n  enabled:\n", []string{"line 2", "needs a single value"}},
		{"list", nil, "kvcached:\n  enabled: [true]\n", []string{"needs a single value"}},
		{"twice", nil, "kvcached:\n  enabled: true\n  enabled: false\n", []string{"line 3", "set in line 2 already"}},
		{"two sections", nil, "kvcached:\n  enabled: true\nkvcached:\n  enabled: false\n", []string{"line 3", "second time"}},
		{"no section", nil, "kvcached: true\n", []string{"line 1", "must be a section"}},
		{"no mapping", nil, "- a\n- b\n", []string{"line 1", "key: value"}},
		{"no YAML", nil, "kvcached:\n\tenabled: true\n", []string{"not valid YAML", "line 2"}},
		{"two documents", nil, "a: 1\n---\nb: 2\n", []string{"more than one YAML document"}},
		{"merge key", nil, "x: &x\n  enabled: true\nkvcached:\n  <<: *x\n", []string{"unknown key"}},
		{"file bad though overridden", []string{"OLLAMA_KVCACHED_ENABLED=1"}, "kvcached:\n  enabled: maybe\n", []string{"line 2", `"maybe"`}},
		{
			"all of them", []string{"OLLAMA_KVCACHED_ENABLED=maybe", "OLLAMA_KVCACHED_GROUP=x"}, "kvcached:\n  max_ctx: 1\n",
			[]string{"maybe", "OLLAMA_KVCACHED_GROUP", "kvcached.max_ctx"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := ""
			if test.config != "" {
				config = write(t, test.config)
			}
			got, err := ReadSettings(test.environ, config)
			var bad *SettingsError
			if !errors.As(err, &bad) {
				t.Fatalf("no SettingsError: %+v, %v", got, err)
			}
			if got != (Settings{Limit: NoLimit}) {
				t.Errorf("half-read settings: %+v", got)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q lacks %q", err, want)
				}
			}
			if config != "" && !strings.Contains(err.Error(), config) {
				t.Errorf("%q does not name the file", err)
			}
		})
	}
}

func TestAliasIsFollowed(t *testing.T) {
	got, err := ReadSettings(nil, write(t, "size: &size 2GB\nkvcached:\n  memory_limit: *size\n"))
	if err != nil || got.Limit != 2e9 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestUnreadableFile(t *testing.T) {
	// A directory in the file's place: refused for every user, root too.
	_, err := ReadSettings(nil, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "cannot be read") {
		t.Errorf("%v", err)
	}
}

func TestLoadSettingsReadsTheUsersFile(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	if err := os.MkdirAll(filepath.Join(home, ".ollama"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".ollama", "config.yaml"), []byte("kvcached: {enabled: on}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := LoadSettings()
	if err != nil || !got.Enabled {
		t.Errorf("%+v, %v", got, err)
	}
	t.Setenv(EnabledVariable, "off")
	if got, err = LoadSettings(); err != nil || got.Enabled {
		t.Errorf("%+v, %v", got, err)
	}
}
