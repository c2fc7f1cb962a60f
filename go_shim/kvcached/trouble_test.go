//go:build go1.25

package kvcached

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var errTorn = &LibraryError{Code: -6, Name: "KVCACHED_E_LEDGER", Text: "the ledger file cannot be used", Detail: "torn"}

func TestLedgerThatCannotBeRead(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b")
		a, b := list[0], list[1]
		a.Begin()
		if err := a.Awake(w.Context()); err != nil {
			w.Fatal(err)
		}
		waits := make(chan error, 2)
		go func() { waits <- w.request(w.Context(), b, 0) }()
		go func() {
			_, err := w.admit("c", Request{Need: Need{Weights: 60}}, time.Hour)
			waits <- err
		}()
		time.Sleep(5 * time.Second)
		start := time.Now()
		w.l.breakWith(errTorn)
		for range 2 {
			if err := <-waits; !errors.Is(err, errTorn) || !strings.Contains(err.Error(), "host") {
				w.Errorf("%v", err)
			}
		}
		if _, err := w.admit("d", Request{Need: Need{Weights: 1}}, time.Hour); !errors.Is(err, errTorn) {
			w.Errorf("%v", err)
		}
		if err := a.Awake(w.Context()); !errors.Is(err, errTorn) {
			w.Errorf("%v", err)
		}
		if _, err := w.m.Stats(); !errors.Is(err, errTorn) {
			w.Errorf("%v", err)
		}
		if took := time.Since(start); took > 2*time.Second {
			w.Errorf("told after %v", took)
		}
		w.idle()

		// Mended, it goes on.
		w.l.breakWith(nil)
		time.Sleep(2 * time.Second)
		a.End()
		if err := w.request(w.Context(), b, 0); err != nil {
			w.Error(err)
		}
		w.idle()
	})
}

func TestModelThatCannotWake(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b")
		lost := &LibraryError{Code: -12, Name: "KVCACHED_E_DEVICE", Text: "the driver failed"}
		w.l.answer = func(name string, _ Command) error {
			if name == "a" {
				return lost
			}
			return nil
		}
		var failed *WakeError
		if err := w.request(w.Context(), list[0], 0); !errors.As(err, &failed) || !errors.Is(err, lost) {
			w.Errorf("%v", err)
		}
		if err := w.request(w.Context(), list[1], 0); err != nil {
			w.Error(err)
		}

		// One that hangs is told three times, and holds nobody else up for longer than one of them.
		w.l.answer = nil
		w.l.took[CommandWake] = time.Hour
		done := make(chan error, 1)
		go func() { done <- w.request(w.Context(), list[0], 0) }()
		if err := <-done; !errors.As(err, &failed) || !errors.Is(err, ErrTimeout) {
			w.Errorf("%v", err)
		}
		w.idle()
	})
}

func TestChildThatEndsWhileItWakes(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a")
		w.l.answer = func(string, Command) error { return ErrSlot }
		var ended *EndedError
		if err := w.request(w.Context(), list[0], 0); !errors.As(err, &ended) {
			w.Errorf("%v", err)
		}
		w.idle()
	})
}

// The limit has room, the device has none: others sleep all the same, and without any it is an error.
func TestDeviceIsFullerThanTheLedgerKnows(t *testing.T) {
	inWorld(t, 1000, func(w *world) {
		b := w.load("b", Need{Weights: 60})
		list := w.asleepAll("a")
		time.Sleep(5 * time.Second)
		w.l.answer = func(name string, command Command) error {
			if name == "a" && command == CommandWake && w.slot(b).Charge > 0 {
				return ErrShort
			}
			return nil
		}
		if err := w.request(w.Context(), list[0], 0); err != nil {
			w.Error(err)
		}
		if !w.asleep(b) {
			w.Error("b is awake")
		}

		w.l.answer = func(name string, command Command) error {
			if command == CommandWake {
				return ErrShort
			}
			return nil
		}
		time.Sleep(5 * time.Second)
		var failed *WakeError
		if err := w.request(w.Context(), b, 0); !errors.As(err, &failed) {
			w.Errorf("%v", err)
		}
		w.idle()
	})
}

// A victim that came to be in use meanwhile is left alone; one that cannot sleep is tried again later, and others before.
func TestVictimsThatDoNotSleep(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		w.load("a", Need{Weights: 50})
		time.Sleep(5 * time.Second)
		w.load("b", Need{Weights: 50})
		time.Sleep(5 * time.Second)
		w.l.answer = func(name string, command Command) error {
			if name == "a" && command == CommandSleep {
				return ErrBusy
			}
			return nil
		}
		w.load("c", Need{Weights: 50})
		w.expect("sleep a", "sleep b")

		w.l.answer = func(name string, command Command) error {
			if name == "a" && command == CommandSleep {
				return ErrTimeout
			}
			return nil
		}
		w.children["c"].Begin()
		time.Sleep(5 * time.Second)
		done := make(chan error, 1)
		go func() { done <- w.request(w.Context(), w.children["b"], 0) }()
		time.Sleep(5 * time.Second)
		w.expect("sleep a")
		w.l.mu.Lock()
		w.l.answer = nil
		w.l.mu.Unlock()
		if err := <-done; err != nil {
			w.Error(err)
		}
		w.expect("sleep a", "wake b")
		w.children["c"].End()
		w.idle()
	})
}

// A child that hangs as it is to sleep is not waited for longer than a sleep takes.
func TestVictimThatHangs(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 40})
		time.Sleep(5 * time.Second)
		w.load("b", Need{Weights: 40})
		time.Sleep(5 * time.Second)
		w.l.mu.Lock()
		w.l.answer = func(name string, command Command) error {
			if name == "a" {
				time.Sleep(sleepWait)
				return ErrTimeout
			}
			return nil
		}
		w.l.mu.Unlock()
		start := time.Now()
		w.load("c", Need{Weights: 40})
		if waited := time.Since(start); waited < sleepCounts || waited > sleepCounts+2*time.Second {
			w.Errorf("waited %v", waited)
		}
		w.expect("sleep a", "sleep b")
		if a.State() != StateSleeping {
			w.Errorf("a is %s", a.State())
		}
		time.Sleep(sleepWait)
		w.idle()
	})
}

func TestTimers(t *testing.T) {
	inWorld(t, 1000, func(w *world) {
		a, b := w.load("a", Need{Weights: 50}), w.load("b", Need{Weights: 50})
		b.Begin()
		b.Sleep() // too late: a request holds it
		a.Sleep() // keep-alive is over
		w.expect("sleep a")
		if a.State() != StateAsleep || b.State() != StateAwake {
			w.Errorf("%s, %s", a.State(), b.State())
		}
		b.End()
		time.Sleep(30 * time.Second)
		w.expect()
		time.Sleep(31 * time.Second) // idle_seconds
		w.expect("sleep b")
		time.Sleep(58 * time.Minute)
		w.unloaded()
		if err := w.request(w.Context(), b, 0); err != nil { // its time begins anew
			w.Error(err)
		}
		w.expect("wake b")
		time.Sleep(time.Minute)
		w.unloaded("a")
		w.expect("sleep b")
		time.Sleep(62 * time.Minute)
		w.unloaded("b")
		if len(w.l.slots) != 0 {
			w.Errorf("%+v", w.l.slots)
		}
		w.idle()
	}, func(m *Manager) { m.tuning.idle = time.Minute })
}

// A scheduler that says the model is in use is asked again; one that says it will unload and does not, too.
func TestUnloadIsAskedAgain(t *testing.T) {
	inWorld(t, 1000, func(w *world) {
		a := w.load("a", Need{Weights: 50})
		w.refuse = true
		a.Sleep()
		time.Sleep(time.Hour + 2500*time.Millisecond)
		w.unloaded("a", "a", "a")
		w.mu.Lock()
		w.refuse = false
		w.mu.Unlock()
		time.Sleep(2 * time.Second)
		w.unloaded("a")
		if a.State() != StateLeased || a.Slot() != noSlot {
			w.Errorf("%s, %d", a.State(), a.Slot())
		}
		w.idle()
	})
}

// A child that answers no commands is unloaded when its time is over, as in stock Ollama, and when room is needed.
func TestChildThatAnswersNoCommands(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b := w.load("a", Need{Weights: 40}), w.load("b", Need{Weights: 40})
		for _, c := range []*KVCache{a, b} {
			w.l.set(c.Slot(), func(s *Slot) { s.Controlled = false })
		}
		synctest.Wait()
		if a.CanSleep() {
			w.Error("a cannot sleep")
		}
		a.Sleep()
		time.Sleep(2 * time.Second)
		w.unloaded("a")
		w.load("c", Need{Weights: 70})
		w.unloaded("b")
		w.expect()
		if !w.children["c"].CanSleep() {
			w.Error("c can sleep")
		}
		w.idle()
	})
}

func TestCloseEndsEveryWait(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 60})
		a.Begin()
		done := make(chan error)
		go func() {
			_, err := w.admit("b", Request{Need: Need{Weights: 60}}, time.Hour)
			done <- err
		}()
		synctest.Wait()
		w.m.Close()
		if err := <-done; !errors.Is(err, errClosed) {
			w.Errorf("%v", err)
		}
		if _, err := w.admit("c", Request{Need: Need{Weights: 1}}, time.Hour); !errors.Is(err, errClosed) {
			w.Errorf("%v", err)
		}
		if err := a.Awake(w.Context()); !errors.Is(err, errClosed) {
			w.Errorf("%v", err)
		}
	})
}
