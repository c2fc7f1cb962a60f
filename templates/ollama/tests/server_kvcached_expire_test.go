package server

import (
	"slices"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
)

// sleepFor sets how long a sleeper stays.
func sleepFor(d time.Duration) func(*kvcached.Settings) {
	return func(s *kvcached.Settings) { s.Sleep = d }
}

// With the keep-alive time over a model sleeps, and only a while later its runner ends, with one event.
func TestKVCachedKeepAliveBecomesSleep(t *testing.T) {
	b := newBench(t, 2.5, sleepFor(400*time.Millisecond))
	path := kvcachedModel(t)
	if err := b.ask("a", path, keepAlive(50*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b.until("a sleeps", func() bool { return b.states()["a"] == "asleep" })
	if got := b.runners(); len(got) != 1 {
		t.Fatalf("%v", got)
	}
	until := b.loadedModels()[0].expiresAt
	if left := time.Until(until); left <= 0 || left > 400*time.Millisecond {
		t.Errorf("it is to stay for %v", left)
	}
	b.until("it is unloaded", func() bool { return len(b.runners()) == 0 })
	if time.Now().Before(until.Add(-time.Millisecond)) {
		t.Error("unloaded early")
	}
	b.until("its lease is back", func() bool { slots, _ := b.ledger.Slots(); return len(slots) == 0 })
}

// A request stops the time of a sleeper, and the next keep-alive time begins with its end.
func TestKVCachedRequestForASleeper(t *testing.T) {
	b := newBench(t, 2.5, sleepFor(300*time.Millisecond))
	path := kvcachedModel(t)
	if err := b.ask("a", path, keepAlive(20*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b.until("a sleeps", func() bool { return b.states()["a"] == "asleep" })
	r := b.send("a", path, keepAlive(20*time.Millisecond))
	runner := r.must()
	time.Sleep(500 * time.Millisecond)
	if got := b.runners(); len(got) != 1 || b.states()["a"] != "awake" {
		t.Errorf("%v, %v", got, b.states())
	}
	r.finish(runner)
	// It may not sleep so soon after it woke, but its time is over all the same.
	b.until("it is unloaded", func() bool { return len(b.runners()) == 0 })
	if got := b.ledger.Commands(); !slices.Equal(got, []string{"sleep a:latest", "wake a:latest"}) {
		t.Errorf("%v", got)
	}
}

// Whatever has no time left is unloaded as in stock, asleep or awake: `ollama stop`, keep_alive 0, a device that ran out,
// the manager's own wish.
func TestKVCachedUnloads(t *testing.T) {
	for name, end := range map[string]func(b *bench, path string){
		"stop":   func(b *bench, path string) { b.expireRunner(&Model{ModelPath: path}) },
		"device": func(b *bench, path string) { b.expireRunnersForRuntimeOOM(&Model{ModelPath: path}, errOutOfMemory{}) },
		"keep_alive 0": func(b *bench, path string) {
			if err := b.ask("a", path, keepAlive(0)); err != nil {
				t.Error(err)
			}
		},
		"manager": func(b *bench, path string) {
			if !b.kvcachedUnload(path) {
				t.Error("not unloaded for the manager")
			}
		},
	} {
		for _, asleep := range []bool{false, true} {
			b := newBench(t, 2.5)
			path := kvcachedModel(t)
			if err := b.ask("a", path, keepAlive(time.Hour)); err != nil {
				t.Fatal(err)
			}
			if asleep {
				b.loadedMu.Lock()
				cache := b.loaded[path].kvcachedCache()
				b.loadedMu.Unlock()
				cache.Sleep()
				b.until("a sleeps", func() bool { return b.states()["a"] == "asleep" })
			}
			end(b, path)
			b.until(name+" unloads", func() bool { return len(b.runners()) == 0 })
			b.until("its lease is back", func() bool { slots, _ := b.ledger.Slots(); return len(slots) == 0 })
			for _, command := range b.ledger.Commands() {
				if !asleep && command == "sleep a:latest" {
					t.Errorf("%s: put to sleep first", name)
				}
			}
		}
	}
}

type errOutOfMemory struct{}

func (errOutOfMemory) Error() string { return "cudaMalloc failed: out of memory" }

// One event an unload, whichever way it came about: counted in a scheduler whose loading loop does not run.
func TestKVCachedOneEventEach(t *testing.T) {
	b := newBench(t, 9, sleepFor(50*time.Millisecond))
	paths := map[string]string{}
	for _, name := range []string{"stopped", "manager", "slept", "kept", "device", "another"} {
		paths[name] = kvcachedModel(t)
		if err := b.ask(name, paths[name]); err != nil {
			t.Fatal(err)
		}
	}
	s := &Scheduler{finishedReqCh: make(chan *LlmRequest, 9), expiredCh: make(chan *runnerRef, 9), unloadedCh: make(chan any, 9),
		loaded: map[string]*runnerRef{}, getGpuFn: b.getGpuFn, waitForRecovery: time.Minute}
	b.loadedMu.Lock()
	for key, runner := range b.loaded {
		s.loaded[key] = runner
		delete(b.loaded, key)
	}
	b.loadedMu.Unlock()
	go s.processCompleted(t.Context())

	runnerOf := func(name string) *runnerRef {
		s.loadedMu.Lock()
		defer s.loadedMu.Unlock()
		return s.loaded[paths[name]]
	}
	events := func(what string, want int) {
		t.Helper()
		for range want {
			select {
			case <-s.unloadedCh:
			case <-time.After(10 * time.Second):
				t.Fatalf("%s: an event is missing", what)
			}
		}
		time.Sleep(100 * time.Millisecond)
		if n := len(s.unloadedCh); n != 0 {
			t.Fatalf("%s: %d events too many", what, n)
		}
	}

	s.expireRunner(&Model{ModelPath: paths["stopped"]})
	events("ollama stop", 1)
	if !s.kvcachedUnload(paths["manager"]) {
		t.Error("not unloaded for the manager")
	}
	events("manager", 1)
	slept := runnerOf("slept")
	slept.refMu.Lock()
	s.kvcachedExpire(slept)
	slept.refMu.Unlock()
	events("slept for long enough", 1)
	kept := runnerOf("kept") // its last request asked for no time
	kept.refMu.Lock()
	kept.refCount, kept.sessionDuration = 1, 0
	kept.kvcachedCache().Begin()
	kept.refMu.Unlock()
	s.finishedReqCh <- &LlmRequest{model: kept.model}
	events("keep_alive 0", 1)
	s.expireRunnersForRuntimeOOM(&Model{ModelPath: paths["device"]}, errOutOfMemory{})
	events("a device that ran out", 2)
	if len(b.runners()) != 0 || runnerOf("device") != nil || runnerOf("another") != nil {
		t.Error("some are left")
	}
}

// One that is kept for ever sleeps under pressure, and is not unloaded for the manager.
func TestKVCachedKeptForEver(t *testing.T) {
	b := newBench(t, 1.5)
	var forever api.Duration
	if err := forever.UnmarshalJSON([]byte("-1")); err != nil {
		t.Fatal(err)
	}
	path := kvcachedModel(t)
	if err := b.ask("a", path, keepAlive(forever.Duration)); err != nil {
		t.Fatal(err)
	}
	if err := b.ask("b", kvcachedModel(t)); err != nil {
		t.Fatal(err)
	}
	if got := b.states(); got["a"] != "asleep" || b.kvcachedUnload(path) {
		t.Errorf("%v, or unloaded", got)
	}
}

// A child that cannot sleep keeps its memory no longer than in stock; nor does any where sleepers are to end at once.
func TestKVCachedOneThatCannotSleep(t *testing.T) {
	for name, settings := range map[string]func(*kvcached.Settings){"no commands": sleepFor(time.Hour), "no time": sleepFor(0)} {
		b := newBench(t, 2.5, settings)
		if name == "no commands" {
			b.change = func(c *child) { b.ledger.Set(c.cache.Slot(), func(s *kvcached.Slot) { s.Controlled = false }) }
		}
		if err := b.ask("a", kvcachedModel(t), keepAlive(50*time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		b.until(name+" unloads", func() bool { return len(b.runners()) == 0 })
		if got := b.ledger.Commands(); len(got) != 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// The manager is told at once about a model that it cannot have: one that loads or is in use, and one that is not there.
func TestKVCachedUnloadOfAModelInUse(t *testing.T) {
	b := newBench(t, 2.5)
	path := kvcachedModel(t)
	b.send("a", path).must()
	if b.kvcachedUnload(path) || b.kvcachedUnload(path+"x") {
		t.Error("in use, and to be unloaded")
	}
	b.loadedMu.Lock()
	runner := b.loaded[path]
	b.loadedMu.Unlock()
	runner.refMu.Lock()
	answer := make(chan bool, 1)
	go func() { answer <- b.kvcachedUnload(path) }()
	select {
	case unloads := <-answer:
		if unloads {
			t.Error("busy, and to be unloaded")
		}
	case <-time.After(5 * time.Second):
		t.Error("it waits for a lock that may be held for long")
	}
	runner.refMu.Unlock()
}
