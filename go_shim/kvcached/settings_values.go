package kvcached

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// PolicyLRU puts the model to sleep first that has been used least recently.
const PolicyLRU = "lru"

const (
	maxSeconds = 1_000_000_000
	maxContext = 1 << 30
	maxSocket  = 107 // bytes of a unix socket's path
)

func applyEnabled(s *Settings, value, _ string, _ bool) error {
	enabled, err := parseBool(value)
	if err != nil {
		return err
	}
	s.Enabled = enabled
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

// bareUnit is the unit of a size without one: a variable's name says it, a key's does not.
func bareUnit(fromFile bool) string {
	if fromFile {
		return ""
	}
	return "GB"
}

func applyLimit(s *Settings, value, where string, fromFile bool) error {
	limit, err := ParseSize(value, bareUnit(fromFile))
	if err != nil {
		return err
	}
	s.Limit, s.Source = limit, where
	return nil
}

func applyHostLimit(s *Settings, value, _ string, fromFile bool) error {
	limit, err := ParseSize(value, bareUnit(fromFile))
	if err != nil {
		return err
	}
	s.HostLimit, s.HostText = limit, value
	if !strings.ContainsAny(value[len(value)-1:], "bB") {
		s.HostText += bareUnit(fromFile)
	}
	return nil
}

// setHostLimit is applyHostLimit of the default.
func (s *Settings) setHostLimit(bytes uint64) {
	if bytes != NoLimit {
		s.HostLimit, s.HostText = bytes, fmt.Sprintf("%dMiB", bytes>>20)
	}
}

func applySocket(s *Settings, value, _ string, _ bool) error {
	const form = "write the absolute path of the service's unix socket, such as /run/kvcachedd/kvcachedd.sock"
	switch info, err := os.Stat(value); {
	case !filepath.IsAbs(value):
		return fmt.Errorf("%q is not an absolute path: %s", value, form)
	case len(value) > maxSocket:
		return fmt.Errorf("%q has %d bytes, and a socket's path has at most %d: %s", value, len(value), maxSocket, form)
	case err == nil && info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("%q is not a socket: %s", value, form)
	}
	s.Socket = filepath.Clean(value) // it may not be there yet: the service may start later
	return nil
}

func applyPolicy(s *Settings, value, _ string, _ bool) error {
	if !strings.EqualFold(value, PolicyLRU) {
		return fmt.Errorf("%q is no policy: write %s", value, PolicyLRU)
	}
	s.Policy = PolicyLRU
	return nil
}

func applyIdle(s *Settings, value, _ string, _ bool) error {
	seconds, err := parseWhole(value, 0, maxSeconds, "a whole number of seconds; 0: only where memory is wanted")
	s.Idle = time.Duration(seconds) * time.Second
	return err
}

func applySleep(s *Settings, value, _ string, _ bool) error {
	seconds, err := parseWhole(value, 1, maxSeconds, "a whole number of seconds")
	s.Sleep = time.Duration(seconds) * time.Second
	return err
}

func applyMaxCtx(s *Settings, value, _ string, _ bool) error {
	tokens, err := parseWhole(value, 1, maxContext, "a whole number of tokens; to reserve what a model is loaded with, leave the setting out")
	s.MaxCtx = tokens
	return err
}

func applyGroup(s *Settings, value, _ string, _ bool) error {
	if _, err := user.LookupGroup(value); err != nil {
		return fmt.Errorf("%q is no group of this system: write the name of one (`getent group` lists them)", value)
	}
	s.Group = value
	return nil
}

func parseWhole(value string, least, most int, form string) (int, error) {
	n, err := strconv.ParseUint(value, 10, 63)
	if err != nil || n < uint64(least) || n > uint64(most) {
		return 0, fmt.Errorf("%q cannot be used: write %s, from %d to %d", value, form, least, most)
	}
	return int(n), nil
}
