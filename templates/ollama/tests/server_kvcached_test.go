package server

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ollama/ollama/envconfig"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
)

func TestKVCachedRoomIsMadeBySleep(t *testing.T) {
	b := newBench(t, 2.5)
	for _, name := range []string{"a", "b", "c", "d"} {
		if err := b.ask(name, kvcachedModel(t)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if got := b.runners(); !slices.Equal(got, []string{"a", "b", "c", "d"}) {
		t.Errorf("loaded: %v", got)
	}
	if got := b.ledger.Commands(); !slices.Equal(got, []string{"sleep a:latest", "sleep b:latest"}) {
		t.Errorf("commands: %v", got)
	}
	if got := b.states(); got["a"] != "asleep" || got["b"] != "asleep" || got["c"] != "awake" || got["d"] != "awake" {
		t.Errorf("states: %v", got)
	}
}

func TestKVCachedRefusesWhatNeverFits(t *testing.T) {
	b := newBench(t, 1.01)
	small := kvcachedModel(t)
	huge := kvcachedModel(t, make([]byte, 16<<20)...)

	var refusal *kvcached.LimitError
	err := b.ask("huge", huge)
	if !errors.As(err, &refusal) || refusal.Model != "huge:latest" || refusal.FitsAlone() {
		t.Errorf("with nothing loaded: %v", err)
	}
	if err := b.ask("small", small); err != nil {
		t.Fatal(err)
	}
	err = b.ask("huge", huge)
	if !errors.As(err, &refusal) || refusal.FitsAlone() {
		t.Errorf("beside another: %v", err)
	}
	if got := b.states(); len(got) != 1 || got["small"] != "awake" {
		t.Errorf("disturbed for a model that can never fit: %v", got)
	}
	if !llm.KVCachedEnded(err) || llm.IsOutOfMemory(err) || strings.Contains(err.Error(), "failed to load model") {
		t.Errorf("%q would be taken for something else", err)
	}
}

func TestKVCachedLeavesNoLeaseBehind(t *testing.T) {
	b := newBench(t, 2.5)
	for _, name := range []string{"a", "b", "c"} {
		if err := b.ask(name, kvcachedModel(t)); err != nil {
			t.Fatal(err)
		}
	}
	b.unloadAllRunners()
	if slots, err := b.ledger.Slots(); err != nil || len(slots) != 0 {
		t.Errorf("%+v, %v", slots, err)
	}
}

// A load that fails once more after its retry gives its lease back, and the next try has one of its own.
func TestKVCachedLoadThatFails(t *testing.T) {
	b := newBench(t, 1.5)
	b.change = func(c *child) { c.loadErr = errors.New("a file is torn") }
	path := kvcachedModel(t)
	for range 2 {
		if err := b.ask("a", path); err == nil || !strings.Contains(err.Error(), "torn") {
			t.Fatalf("%v", err)
		}
	}
	b.until("all leases are back", func() bool { slots, _ := b.ledger.Slots(); return len(slots) == 0 })
	b.change = nil
	if err := b.ask("a", path); err != nil {
		t.Error(err)
	}
}

// Upstream tries a load that ran out of memory once more, without the other models: it is admitted anew.
func TestKVCachedLoadIsTriedOnceMore(t *testing.T) {
	b := newBench(t, 2.5)
	if err := b.ask("other", kvcachedModel(t)); err != nil {
		t.Fatal(err)
	}
	loads := 0
	b.change = func(c *child) {
		if loads++; loads == 1 {
			c.loadErr = errors.New("cudaMalloc failed: out of memory")
		}
	}
	if err := b.ask("a", kvcachedModel(t)); err != nil || loads != 2 {
		t.Errorf("%v after %d loads", err, loads)
	}
	if got := b.states(); len(got) != 1 || got["a"] != "awake" {
		t.Errorf("%v", got)
	}
}

func TestKVCachedStart(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	for _, name := range []string{kvcached.EnabledVariable, kvcached.MemoryVariable} {
		t.Setenv(name, "")
	}
	defer kvcached.SetDefault(nil)

	s := InitScheduler(t.Context())
	stopped := 0
	stop := func() { stopped++ }
	if err := kvcachedStart(s, stop); err != nil || kvcached.Default() != nil || stopped != 0 {
		t.Errorf("unset: %v, %v", err, kvcached.Default())
	}

	t.Setenv(kvcached.EnabledVariable, "perhaps")
	if err := kvcachedStart(s, stop, stop); err == nil || !strings.Contains(err.Error(), kvcached.EnabledVariable) || stopped != 2 {
		t.Errorf("bad value: %v, stopped %d", err, stopped)
	}
	// Other subcommands only show it.
	if got := envconfig.AsMap()[kvcached.EnabledVariable].Value; got != "perhaps" {
		t.Errorf("shown: %v", got)
	}
	t.Setenv(kvcached.EnabledVariable, "")
	if err := os.MkdirAll(filepath.Join(home, ".ollama"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".ollama", "config.yaml"), []byte("kvcached:\n  memory_limit: 2GB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	values := envconfig.Values()
	if values[kvcached.EnabledVariable] != "false" || values[kvcached.MemoryVariable] != "2 GB" {
		t.Errorf("%q, %q", values[kvcached.EnabledVariable], values[kvcached.MemoryVariable])
	}
}
