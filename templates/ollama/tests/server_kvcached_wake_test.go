package server

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
)

// asleep loads models in turn, so that all but the last sleep under room for one.
func (b *bench) asleep(names ...string) map[string]string {
	b.t.Helper()
	paths := map[string]string{}
	for _, name := range names {
		paths[name] = kvcachedModel(b.t)
		if err := b.ask(name, paths[name]); err != nil {
			b.t.Fatal(err)
		}
	}
	return paths
}

// blocked makes a command of one model block until the function returned is called; begun says that it does.
func (b *bench) blocked(name string, command kvcached.Command) (begun chan struct{}, free func()) {
	begun, release := make(chan struct{}), make(chan struct{})
	b.ledger.Answer(func(n string, c kvcached.Command) error {
		if n == name+":latest" && c == command {
			select {
			case begun <- struct{}{}:
			case <-release:
			}
			<-release
		}
		return nil
	})
	return begun, func() { close(release) }
}

// locked fails the test where a lock or a loop of the scheduler is held up.
func (b *bench) mustMove(what string) {
	b.t.Helper()
	done := make(chan struct{})
	go func() {
		b.loadedMu.Lock()
		runners := []*runnerRef{}
		for _, runner := range b.loaded {
			runners = append(runners, runner)
		}
		b.loadedMu.Unlock()
		for _, runner := range runners {
			runner.refMu.Lock()
			runner.refMu.Unlock() //nolint:staticcheck
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		b.t.Fatalf("a lock is held while %s", what)
	}
}

// Nothing of the scheduler waits for a model that wakes, sleeps or waits for room: others are served, loaded and unloaded.
func TestKVCachedNothingBlocksWhileAModelWakes(t *testing.T) {
	b := newBench(t, 2.5)
	paths := b.asleep("a", "b", "c") // a sleeps
	begun, free := b.blocked("a", kvcached.CommandWake)
	waking := b.send("a", paths["a"])
	<-begun
	b.mustMove("a model wakes")

	for range 3 {
		if err := b.ask("c", paths["c"]); err != nil {
			t.Fatal(err)
		}
	}
	// Those that are waking have their users counted, so that nobody unloads them.
	if b.kvcachedUnload(paths["a"]) {
		t.Error("unloaded while it wakes")
	}
	b.expireRunner(&Model{ModelPath: paths["b"]})
	b.until("b is unloaded", func() bool { return !slices.Contains(b.runners(), "b") })
	if err := b.ask("d", kvcachedModel(t)); err != nil {
		t.Fatal(err)
	}
	if len(waking.success)+len(waking.failure) > 0 {
		t.Error("handed over before it was awake")
	}
	free()
	waking.must()
	if got := b.states()["a"]; got != "awake" {
		t.Errorf("%v", got)
	}
}

func TestKVCachedNothingBlocksWhileAModelGoesToSleep(t *testing.T) {
	b := newBench(t, 2.5)
	paths := b.asleep("a", "b")
	begun, free := b.blocked("a", kvcached.CommandSleep)
	loading := b.send("c", kvcachedModel(t)) // wants a's room
	<-begun
	b.mustMove("a model goes to sleep")
	if err := b.ask("b", paths["b"]); err != nil {
		t.Fatal(err)
	}
	again := b.send("a", paths["a"]) // has to wait until it sleeps, and for its turn to wake
	b.mustMove("a request waits for a model that goes to sleep")
	if len(loading.success)+len(again.success) > 0 {
		t.Error("served without room")
	}
	free()
	loading.finish(loading.must())
	again.must()
}

// A wakes for a request that is cancelled, B ends: what B leaves is found by the next, and by A itself.
func TestKVCachedCancelledWhileWaking(t *testing.T) {
	b := newBench(t, 1.5)
	paths := b.asleep("a", "b") // a sleeps, b has the room
	busy := b.send("b", paths["b"])
	holder := busy.must()
	cancelled, patient := b.send("a", paths["a"]), b.send("a", paths["a"])
	b.until("a is used by two", func() bool {
		b.loadedMu.Lock()
		runner := b.loaded[paths["a"]]
		b.loadedMu.Unlock()
		runner.refMu.Lock()
		defer runner.refMu.Unlock()
		return runner.refCount == 2
	})
	b.mustMove("a request waits for its turn to wake")
	cancelled.end()
	if _, err := cancelled.wait(); err == nil || err.Error() != "context canceled" {
		t.Errorf("cancelled: %v", err)
	}
	if len(patient.success) > 0 {
		t.Error("awake without room")
	}
	busy.finish(holder)
	runner := patient.must()
	runner.refMu.Lock()
	count := runner.refCount
	runner.refMu.Unlock()
	if got := b.states(); count != 1 || got["a"] != "awake" || got["b"] != "asleep" {
		t.Errorf("%d users, %v", count, got)
	}
	patient.finish(runner)

	// With everybody gone before it woke, it goes on sleeping, and its room is another's.
	if err := b.ask("b", paths["b"]); err != nil {
		t.Fatal(err)
	}
	busy = b.send("b", paths["b"])
	holder = busy.must()
	only := b.send("a", paths["a"])
	time.Sleep(20 * time.Millisecond)
	only.end()
	if _, err := only.wait(); err == nil {
		t.Error("awake without room")
	}
	busy.finish(holder)
	if err := b.ask("c", kvcachedModel(t)); err != nil {
		t.Fatal(err)
	}
	if got := b.states(); got["a"] != "asleep" || got["c"] != "awake" {
		t.Errorf("%v", got)
	}
	for name, path := range paths {
		b.until(name+" has no users", func() bool {
			b.loadedMu.Lock()
			runner := b.loaded[path]
			b.loadedMu.Unlock()
			runner.refMu.Lock()
			defer runner.refMu.Unlock()
			return runner.refCount == 0
		})
	}
}

// A child that cannot wake is the request's error, not a hang; the model stays, and the next request may wake it.
func TestKVCachedWakeThatFails(t *testing.T) {
	b := newBench(t, 1.5)
	paths := b.asleep("a", "b")
	b.ledger.Answer(func(_ string, c kvcached.Command) error {
		if c == kvcached.CommandWake {
			return errors.New("a page of its copy cannot be read")
		}
		return nil
	})
	err := b.ask("a", paths["a"])
	if !errors.Is(err, ErrMaxQueue) || llm.IsOutOfMemory(err) || !strings.Contains(err.Error(), "a:latest") {
		t.Fatalf("%v", err)
	}
	b.ledger.Answer(nil)
	if err := b.ask("a", paths["a"]); err != nil {
		t.Error(err)
	}
}

// A model that ends while a request waits for it says so.
func TestKVCachedEndWhileWaking(t *testing.T) {
	b := newBench(t, 1.5)
	paths := b.asleep("a", "b")
	busy := b.send("b", paths["b"])
	busy.must()
	waking := b.send("a", paths["a"])
	b.until("a waits for its turn", func() bool { return b.states()["a"] == "waking" })
	b.loadedMu.Lock()
	b.loaded[paths["a"]].kvcachedCache().Free() // as its process's end does
	b.loadedMu.Unlock()
	var ended *kvcached.EndedError
	if _, err := waking.wait(); !errors.As(err, &ended) || !errors.Is(err, ErrMaxQueue) || llm.IsOutOfMemory(err) {
		t.Errorf("%v", err)
	}
}
