package kvcached

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The variables of the settings.
const (
	EnabledVariable     = variablePrefix + "ENABLED"
	MemoryVariable      = variablePrefix + "MEMORY_GB"
	SocketVariable      = variablePrefix + "SOCKET"
	PolicyVariable      = variablePrefix + "EVICTION_POLICY"
	HostMemoryVariable  = variablePrefix + "HOST_MEMORY_GB"
	IdleVariable        = variablePrefix + "IDLE_SECONDS"
	SleepVariable       = variablePrefix + "SLEEP_SECONDS"
	MaxCtxVariable      = variablePrefix + "MAX_CTX"
	SystemGroupVariable = variablePrefix + "GROUP"

	// HTTPVariable is llama-server's own: it is handed on, and not looked at here.
	HTTPVariable = variablePrefix + "HTTP"

	variablePrefix = "OLLAMA_KVCACHED_"
	section        = "kvcached"
)

// DefaultSleep is how long a model sleeps before it is unloaded.
const DefaultSleep = 1800 * time.Second

// Settings is what the user asked for, with defaults for the rest.
type Settings struct {
	Enabled   bool
	Limit     uint64        // bytes that all models of one server may be charged together on a device; NoLimit: the default
	Source    string        // where Limit was read: a variable, or a file with a line; "" when not set
	Socket    string        // of the external service; "" for none
	Policy    string        // who sleeps first
	HostLimit uint64        // bytes of host memory for what sleeps; NoLimit where the machine's memory is not known
	HostText  string        // HostLimit as a child reads it; "" for NoLimit
	Idle      time.Duration // after which a model sleeps without pressure; 0: only under pressure
	Sleep     time.Duration // after which a sleeper is unloaded
	MaxCtx    int           // context that is reserved; 0: as much as a model is loaded with
	Group     string        // system group that may read; "" for none
}

func defaults() Settings {
	return Settings{Limit: NoLimit, Policy: PolicyLRU, HostLimit: NoLimit, Sleep: DefaultSleep}
}

// LimitText is the limit as shown in reports, "" for none.
func (s Settings) LimitText() string {
	if s.Limit == NoLimit {
		return ""
	}
	return FormatSize(s.Limit)
}

// setting ties a variable to its key in the configuration file.
type setting struct {
	variable string
	key      string
	apply    func(s *Settings, value, where string, fromFile bool) error
}

var table = []setting{
	{EnabledVariable, "enabled", applyEnabled},
	{MemoryVariable, "memory_limit", applyLimit},
	{SocketVariable, "socket", applySocket},
	{PolicyVariable, "eviction_policy", applyPolicy},
	{HostMemoryVariable, "host_memory_limit", applyHostLimit},
	{IdleVariable, "idle_seconds", applyIdle},
	{SleepVariable, "sleep_seconds", applySleep},
	{MaxCtxVariable, "max_ctx", applyMaxCtx},
	{SystemGroupVariable, "group", applyGroup},
}

// Problem is one setting that cannot be used.
type Problem struct {
	Where string // a variable, or a file with a line
	Text  string // what is wrong with it and what to do
}

func (p Problem) String() string { return p.Where + ": " + p.Text }

// SettingsError lists everything that is wrong with the settings, not just the first thing.
type SettingsError struct{ Problems []Problem }

func (e *SettingsError) Error() string {
	lines := make([]string, 0, len(e.Problems))
	for _, p := range e.Problems {
		lines = append(lines, p.String())
	}
	return "kvcached settings: " + strings.Join(lines, "\n")
}

// ConfigPath is the configuration file of the current user, "" when the user has no home directory.
func ConfigPath() string {
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".ollama", "config.yaml")
}

// LoadSettings reads the process's environment and ConfigPath. On a *SettingsError the settings returned are the
// defaults: a half-read configuration is not used.
func LoadSettings() (Settings, error) { return ReadSettings(os.Environ(), ConfigPath()) }

// ReadSettings is LoadSettings for a given environment (as os.Environ has it) and file ("" for none; one that does not
// exist is the same as an empty one).
func ReadSettings(environ []string, config string) (Settings, error) {
	settings := defaults()

	// The file first, so that the environment has the last word; its mistakes are reported all the same.
	problems := readConfig(config, &settings)
	problems = append(problems, readEnvironment(environ, &settings)...)
	if len(problems) > 0 {
		return defaults(), &SettingsError{Problems: problems}
	}
	if settings.Enabled && settings.HostLimit == NoLimit {
		settings.setHostLimit(defaultHostLimit(os.DirFS("/")))
	}
	return settings, nil
}

func readEnvironment(environ []string, settings *Settings) []Problem {
	var problems []Problem
	for _, entry := range slices.Sorted(slices.Values(environ)) {
		name, raw, ok := strings.Cut(entry, "=")
		if !ok || !strings.HasPrefix(strings.ToUpper(name), variablePrefix) {
			continue
		}
		// Ollama trims its own variables in the same way.
		value := strings.Trim(strings.TrimSpace(raw), `"'`)
		i := slices.IndexFunc(table, func(s setting) bool { return s.variable == name })
		switch {
		case name == HTTPVariable:
		case i < 0:
			problems = append(problems, Problem{name, unknown("variable", name, variables())})
		case value == "":
			// as good as unset
		default:
			if err := table[i].apply(settings, value, name, false); err != nil {
				problems = append(problems, Problem{name, err.Error()})
			}
		}
	}
	return problems
}

func variables() []string {
	names := make([]string, 0, len(table))
	for _, s := range table {
		names = append(names, s.variable)
	}
	return names
}

func keys() []string {
	names := make([]string, 0, len(table))
	for _, s := range table {
		names = append(names, s.key)
	}
	return names
}

// unknown says that a name means nothing here, and what was probably meant; with nothing near, what there is.
func unknown(kind, name string, known []string) string {
	// The prefix that all variables share would make any two of them look alike.
	bare := func(s string) string { return strings.ToLower(strings.TrimPrefix(strings.ToUpper(s), variablePrefix)) }
	best, distance := "", len(bare(name))/3+1
	for _, candidate := range known {
		if d := editDistance(bare(name), bare(candidate)); d <= distance && (best == "" || d < distance) {
			best, distance = candidate, d
		}
	}
	if best != "" {
		return fmt.Sprintf("unknown %s; did you mean %s?", kind, best)
	}
	return fmt.Sprintf("unknown %s; there are %s and %s", kind, strings.Join(known[:len(known)-1], ", "), known[len(known)-1])
}

// editDistance is Levenshtein's: how many single characters to insert, delete or replace to turn a into b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
