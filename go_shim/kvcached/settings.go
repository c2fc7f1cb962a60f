package kvcached

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The settings that act. The others that are reserved are in the table below.
const (
	EnabledVariable = "OLLAMA_KVCACHED_ENABLED"
	MemoryVariable  = "OLLAMA_KVCACHED_MEMORY_GB"

	variablePrefix = "OLLAMA_KVCACHED_"
	section        = "kvcached"
)

// Settings is what the user asked for.
type Settings struct {
	Enabled bool
	Limit   uint64 // bytes that all models of one server may be charged together; NoLimit when not set
	Source  string // where Limit was read: a variable, or a file with a line; "" when not set
}

// LimitText is the limit as shown in reports, "" for none.
func (s Settings) LimitText() string {
	if s.Limit == NoLimit {
		return ""
	}
	return FormatSize(s.Limit)
}

// setting ties a variable to its key in the configuration file. apply is nil for a setting that is reserved: it has a
// meaning in later builds, so that giving it a value here must not pass unnoticed.
type setting struct {
	variable string
	key      string
	apply    func(s *Settings, value, where string, fromFile bool) error
}

var table = []setting{
	{EnabledVariable, "enabled", applyEnabled},
	{MemoryVariable, "memory_limit", applyLimit},
	{variablePrefix + "SOCKET", "socket", nil},
	{variablePrefix + "EVICTION_POLICY", "eviction_policy", nil},
	{variablePrefix + "HOST_MEMORY_GB", "host_memory_limit", nil},
	{variablePrefix + "IDLE_SECONDS", "idle_seconds", nil},
	{variablePrefix + "SLEEP_SECONDS", "sleep_seconds", nil},
	{variablePrefix + "MAX_CTX", "max_ctx", nil},
	{variablePrefix + "GROUP", "group", nil},
}

func applyEnabled(s *Settings, value, _ string, _ bool) error {
	enabled, err := parseBool(value)
	if err != nil {
		return err
	}
	s.Enabled = enabled
	return nil
}

func applyLimit(s *Settings, value, where string, fromFile bool) error {
	bareUnit := "GB" // the variable's name says so
	if fromFile {
		bareUnit = ""
	}
	limit, err := ParseSize(value, bareUnit)
	if err != nil {
		return err
	}
	s.Limit, s.Source = limit, where
	return nil
}

func parseBool(value string) (bool, error) {
	switch strings.ToLower(value) {
	case "1", "true", "yes", "on":
		return true, nil
	case "0", "false", "no", "off":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither true nor false: write 1, true, yes or on, or 0, false, no or off", value)
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
	settings := Settings{Limit: NoLimit}

	// The file first, so that the environment has the last word; its mistakes are reported all the same.
	problems := readConfig(config, &settings)
	problems = append(problems, readEnvironment(environ, &settings)...)
	if len(problems) > 0 {
		return Settings{Limit: NoLimit}, &SettingsError{Problems: problems}
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
		case i < 0:
			problems = append(problems, Problem{name, unknown("variable", name, variables())})
		case value == "":
			// as good as unset
		case table[i].apply == nil:
			problems = append(problems, Problem{name, "this setting is not acted on by this build; unset it"})
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
	var acting []string
	for i, s := range table {
		if s.apply != nil {
			acting = append(acting, known[i])
		}
	}
	return fmt.Sprintf("unknown %s; there are %s", kind, strings.Join(acting, " and "))
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
