package kvcached

import (
	"errors"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
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
	want := Settings{Limit: NoLimit, Policy: "lru", HostLimit: NoLimit, Sleep: 1800 * time.Second}
	for name, config := range map[string]string{
		"no home":       "",
		"no file":       filepath.Join(t.TempDir(), "config.yaml"),
		"empty file":    write(t, ""),
		"only comments": write(t, "# nothing here\n"),
		"null":          write(t, "~\n"),
		"others' keys":  write(t, "theme: dark\neditor: {tabs: 4}\n"),
		"empty section": write(t, "kvcached:\n"),
	} {
		got, err := ReadSettings([]string{"HOME=/x", "OLLAMA_HOST=a", "OLLAMA_KVCACHED_SOCKET=", "OLLAMA_KVCACHED_HTTP=1"}, config)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestEnvironmentOverFile(t *testing.T) {
	config := write(t, "other: 1\nkvcached:\n  enabled: yes\n  memory_limit: 20GB\n")

	got, err := ReadSettings(nil, config)
	if err != nil || !got.Enabled || got.Limit != 20e9 || got.Source != config+" line 4 (kvcached.memory_limit)" {
		t.Errorf("file: %+v, %v", got, err)
	}

	got, err = ReadSettings([]string{"OLLAMA_KVCACHED_MEMORY_GB=1.5GiB", `OLLAMA_KVCACHED_ENABLED="Off"`}, config)
	want := defaults()
	want.Limit, want.Source = 3<<29, MemoryVariable
	if err != nil || got != want {
		t.Errorf("both: %+v, %v; want %+v", got, err, want)
	}

	// An empty variable is an unset one.
	got, err = ReadSettings([]string{"OLLAMA_KVCACHED_ENABLED="}, config)
	if err != nil || !got.Enabled {
		t.Errorf("empty variable: %+v, %v", got, err)
	}
}

// TestEverySetting has each setting by variable and by key; each of its forms changes what the other column says.
func TestEverySetting(t *testing.T) {
	folder := t.TempDir()
	listener, err := net.Listen("unix", filepath.Join(folder, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	group, err := user.LookupGroupId(strconv.Itoa(os.Getgid()))
	if err != nil {
		t.Skip("this user's group has no name: ", err)
	}

	for _, test := range []struct {
		variable, key, value string
		change               func(*Settings)
	}{
		{SocketVariable, "socket", folder + "/s", func(s *Settings) { s.Socket = folder + "/s" }},
		{SocketVariable, "socket", folder + "//not-there-yet", func(s *Settings) { s.Socket = folder + "/not-there-yet" }},
		{PolicyVariable, "eviction_policy", "LRU", func(s *Settings) { s.Policy = "lru" }},
		{HostMemoryVariable, "host_memory_limit", "1.5GiB", func(s *Settings) { s.HostLimit, s.HostText = 3<<29, "1.5GiB" }},
		{HostMemoryVariable, "", "4", func(s *Settings) { s.HostLimit, s.HostText = 4e9, "4GB" }},
		{HostMemoryVariable, "host_memory_limit", "250 mb", func(s *Settings) { s.HostLimit, s.HostText = 250e6, "250 mb" }},
		{IdleVariable, "idle_seconds", "0", func(s *Settings) { s.Idle = 0 }},
		{IdleVariable, "idle_seconds", "90", func(s *Settings) { s.Idle = 90 * time.Second }},
		{SleepVariable, "sleep_seconds", "1", func(s *Settings) { s.Sleep = time.Second }},
		{SleepVariable, "sleep_seconds", "1000000000", func(s *Settings) { s.Sleep = 1e9 * time.Second }},
		{MaxCtxVariable, "max_ctx", "65536", func(s *Settings) { s.MaxCtx = 65536 }},
		{SystemGroupVariable, "group", group.Name, func(s *Settings) { s.Group = group.Name }},
	} {
		want := defaults()
		test.change(&want)
		if got, err := ReadSettings([]string{test.variable + "= " + test.value + " "}, ""); err != nil || got != want {
			t.Errorf("%s=%s: %+v, %v; want %+v", test.variable, test.value, got, err, want)
		}
		if test.key == "" {
			continue
		}
		config := write(t, "kvcached:\n  "+test.key+": "+test.value+"\n")
		if got, err := ReadSettings(nil, config); err != nil || got != want {
			t.Errorf("%s: %s: %+v, %v; want %+v", test.key, test.value, got, err, want)
		}
		if got, err := ReadSettings([]string{test.variable + "=bad"}, config); err == nil || !strings.Contains(err.Error(), test.variable+": ") {
			t.Errorf("%s=bad over the file: %+v, %v", test.variable, got, err)
		}
	}
	if len(table) != 9 {
		t.Errorf("%d settings: the new one needs its line above", len(table))
	}
}

func TestHostLimitOfThisMachine(t *testing.T) {
	if _, err := os.Stat("/proc/meminfo"); err != nil {
		t.Skip("no /proc/meminfo")
	}
	got, err := ReadSettings([]string{"OLLAMA_KVCACHED_ENABLED=1"}, "")
	if err != nil || got.HostLimit == NoLimit || got.HostLimit != uint64(defaultHostLimit(os.DirFS("/"))) {
		t.Errorf("%+v, %v", got, err)
	}
	if again, err := ParseSize(got.HostText, ""); err != nil || again != got.HostLimit {
		t.Errorf("a child reads %q as %d, %v; it is %d", got.HostText, again, err, got.HostLimit)
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
		{"unknown", []string{"OLLAMA_KVCACHED_XYZZY_PLUGH=1"}, "", []string{"there are OLLAMA_KVCACHED_ENABLED, OLLAMA_KVCACHED_MEMORY_GB,", " and OLLAMA_KVCACHED_GROUP"}},
		{"relative socket", []string{"OLLAMA_KVCACHED_SOCKET=kvcachedd.sock"}, "", []string{"OLLAMA_KVCACHED_SOCKET: ", "not an absolute path", "/run/"}},
		{"URL", []string{"OLLAMA_KVCACHED_SOCKET=unix:///run/x"}, "", []string{"not an absolute path"}},
		{"no socket", []string{"OLLAMA_KVCACHED_SOCKET=/"}, "", []string{`"/" is not a socket`}},
		{"long socket", []string{"OLLAMA_KVCACHED_SOCKET=/" + strings.Repeat("x", 107)}, "", []string{"108 bytes", "at most 107"}},
		{"policy", nil, "kvcached:\n  eviction_policy: fifo\n", []string{"line 2 (kvcached.eviction_policy)", `"fifo" is no policy`, "lru"}},
		{"host memory", nil, "kvcached:\n  host_memory_limit: 20\n", []string{"line 2 (kvcached.host_memory_limit)", "20GB"}},
		{"host memory 0", []string{"OLLAMA_KVCACHED_HOST_MEMORY_GB=0"}, "", []string{"OLLAMA_KVCACHED_HOST_MEMORY_GB: ", "leave the setting out"}},
		{"seconds with a unit", nil, "kvcached:\n  enabled: true\n  idle_seconds: 5m\n", []string{"line 3 (kvcached.idle_seconds)", `"5m"`, "whole number of seconds"}},
		{"seconds with a point", []string{"OLLAMA_KVCACHED_IDLE_SECONDS=0.5"}, "", []string{`"0.5"`, "from 0 to 1000000000"}},
		{"seconds below 0", []string{"OLLAMA_KVCACHED_IDLE_SECONDS=-1"}, "", []string{`"-1"`}},
		{"sleep of 0", []string{"OLLAMA_KVCACHED_SLEEP_SECONDS=0"}, "", []string{"OLLAMA_KVCACHED_SLEEP_SECONDS: ", "from 1 to"}},
		{"too long a sleep", []string{"OLLAMA_KVCACHED_SLEEP_SECONDS=1000000001"}, "", []string{"to 1000000000"}},
		{"context of 0", []string{"OLLAMA_KVCACHED_MAX_CTX=0"}, "", []string{"OLLAMA_KVCACHED_MAX_CTX: ", "from 1 to 1073741824"}},
		{"context with a unit", []string{"OLLAMA_KVCACHED_MAX_CTX=64k"}, "", []string{`"64k"`, "whole number of tokens"}},
		{"group", []string{"OLLAMA_KVCACHED_GROUP=no such group"}, "", []string{"OLLAMA_KVCACHED_GROUP: ", `"no such group" is no group of this system`, "getent group"}},
		{"group by number", []string{"OLLAMA_KVCACHED_GROUP=0"}, "", []string{`"0" is no group`}},
		{"misspelt switch of llama-server", []string{"OLLAMA_KVCACHED_HTTPS=1"}, "", []string{"OLLAMA_KVCACHED_HTTPS: unknown variable"}},
		{"llama-server's switch is no key", nil, "kvcached:\n  http: true\n", []string{"line 2 (kvcached.http): unknown key"}},
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
			"all of them", []string{"OLLAMA_KVCACHED_ENABLED=maybe", "OLLAMA_KVCACHED_GROUP=no such"}, "kvcached:\n  max_ctx: x\n",
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
			if got != defaults() {
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
