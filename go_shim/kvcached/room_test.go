//go:build go1.25

package kvcached

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestLeastRecentlyUsedSleepsFirst(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b, c := w.load("a", Need{Weights: 30}), w.load("b", Need{Weights: 30}), w.load("c", Need{Weights: 30})
		time.Sleep(5 * time.Second)
		if err := w.request(w.Context(), a, time.Second); err != nil { // so b is the oldest
			w.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		w.load("d", Need{Weights: 40}) // 10 free, 30 lacking
		w.expect("sleep b")
		if w.asleep(a) || !w.asleep(b) || w.asleep(c) {
			w.Error("another one sleeps")
		}
		time.Sleep(5 * time.Second)
		w.load("e", Need{Weights: 31}) // one is not enough: the two that are next
		w.expect("sleep c", "sleep a")
		w.unloaded()
		w.idle()
	})
}

func TestSpareMemoryGoesFirst(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b := w.load("a", Need{Weights: 30}), w.load("b", Need{Weights: 30})
		for _, c := range []*KVCache{a, b} {
			w.l.set(c.Slot(), func(s *Slot) { s.Claim, s.Charge, s.Idle, s.Pooled = 45, 45, 10, 5 })
		}
		a.Begin() // in use: its spare memory stays
		w.load("c", Need{Weights: 20})
		w.expect("trim b")
		a.End()
		w.idle()
	})
}

// A lease that covers what is spare makes a trim useless; so does one that was tried.
func TestNoTrimInVain(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 60})
		w.l.set(a.Slot(), func(s *Slot) { s.Claim, s.Idle = 50, 20 }) // the lease is 60
		w.load("b", Need{Weights: 50})
		w.expect("sleep a")

		c := w.load("c", Need{Weights: 40})
		w.l.set(c.Slot(), func(s *Slot) { s.Claim, s.Charge, s.Idle = 50, 50, 10 })
		w.l.answer = func(_ string, command Command) error {
			if command == CommandTrim {
				return ErrBusy
			}
			return nil
		}
		time.Sleep(5 * time.Second)
		w.load("d", Need{Weights: 10})
		w.expect("trim c", "sleep b")
		w.idle()
	})
}

func TestNobodyInUseIsAVictim(t *testing.T) {
	for name, busy := range map[string]struct{ start, end func(*world, *KVCache) }{
		"request": {func(_ *world, c *KVCache) { c.Begin() }, func(_ *world, c *KVCache) { c.End() }},
		"inside": {
			func(w *world, c *KVCache) { w.l.set(c.Slot(), func(s *Slot) { s.Inside = 1 }) },
			func(w *world, c *KVCache) { w.l.set(c.Slot(), func(s *Slot) { s.Inside = 0 }) },
		},
		"queued": {
			func(w *world, c *KVCache) { w.l.set(c.Slot(), func(s *Slot) { s.Queued = 2 }) },
			func(w *world, c *KVCache) { w.l.set(c.Slot(), func(s *Slot) { s.Queued = 0 }) },
		},
		"loading": {
			func(_ *world, c *KVCache) { c.manager.mu.Lock(); c.used = false; c.manager.mu.Unlock() },
			func(_ *world, c *KVCache) { c.Begin(); c.End() },
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, 100, func(w *world) {
				a := w.load("a", Need{Weights: 80})
				busy.start(w, a)
				if c, err := w.admit("b", Request{Need: Need{Weights: 30}}, 30*time.Second); !errors.Is(err, context.DeadlineExceeded) {
					w.Fatalf("%v, %v", c, err)
				}
				w.expect()
				w.unloaded()
				busy.end(w, a)
				w.load("b", Need{Weights: 30})
				w.expect("sleep a")
				w.idle()
			})
		})
	}
}

// One that has just woken is left alone for two seconds, as long as somebody else gets on.
func TestJustWoken(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b := w.load("a", Need{Weights: 50}), w.load("b", Need{Weights: 40})
		b.Begin() // works on
		w.l.set(a.Slot(), func(s *Slot) { s.Woke = monotonic() })
		start := time.Now()
		w.load("c", Need{Weights: 40})
		if waited := time.Since(start); waited < awakeAtLeast || waited > awakeAtLeast+time.Second {
			w.Errorf("waited %v", waited)
		}
		w.expect("sleep a")

		// With b done and c just woken, nobody gets on: a's turn comes at once.
		b.End()
		w.load("d", Need{Weights: 10})
		time.Sleep(5 * time.Second)
		for _, c := range []string{"b", "c", "d"} {
			w.l.set(w.children[c].Slot(), func(s *Slot) { s.Woke = monotonic() })
		}
		start = time.Now()
		if err := w.request(w.Context(), a, 0); err != nil {
			w.Fatal(err)
		}
		if waited := time.Since(start); waited > 100*time.Millisecond {
			w.Errorf("waited %v", waited)
		}
		w.idle()
	})
}

func TestContextsOfSleepersAreReclaimed(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 40, Context: 10})
		b := w.load("b", Need{Weights: 30, Context: 10})
		time.Sleep(5 * time.Second)
		w.load("c", Need{Weights: 75, Context: 5}) // both contexts stay beside it
		w.expect("sleep a", "sleep b")
		w.unloaded()
		if w.slot(a).Charge != 10 || w.slot(b).Charge != 10 {
			w.Errorf("%+v", w.l.slots)
		}
		time.Sleep(5 * time.Second)
		w.load("d", Need{Weights: 70, Context: 15}) // c's context too: the oldest sleeper goes, no more
		w.expect("sleep c")
		w.unloaded("a")
		w.idle()
	})
}

func TestPinnedModelsAreNeverUnloaded(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, err := w.admit("a", Request{Need: Need{Weights: 40, Context: 10}, Pinned: true}, time.Second)
		if err != nil {
			w.Fatal(err)
		}
		w.attach(a)
		a.Begin()
		a.End()
		_, err = w.admit("b", Request{Need: Need{Weights: 95}}, time.Minute)
		var full *LimitError
		if !errors.As(err, &full) || full.Charged() != 10 {
			w.Fatalf("%v", err)
		}
		w.expect("sleep a") // that much it may
		time.Sleep(3 * time.Hour)
		w.unloaded()

		a.SetPinned(false)
		time.Sleep(2 * time.Second)
		w.unloaded("a")
		w.load("b", Need{Weights: 95})
		w.idle()
	})
}

func TestHostMemoryIsShort(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b, c := w.load("a", Need{Weights: 30}), w.load("b", Need{Weights: 30}), w.load("c", Need{Weights: 30})
		w.l.hostRoom = 60
		a.Sleep()
		time.Sleep(time.Second)
		b.Sleep()
		time.Sleep(time.Second)
		w.expect("sleep a", "sleep b")

		// The oldest sleeper makes room for the third.
		c.Sleep()
		time.Sleep(time.Second)
		w.expect("sleep c", "sleep c")
		w.unloaded("a")
		if !w.asleep(b) || !w.asleep(c) {
			w.Error("b and c are to sleep")
		}

		// Without a sleeper to unload, the idle one goes itself.
		b.SetPinned(true)
		c.SetPinned(true)
		w.load("d", Need{Weights: 50}).Sleep()
		time.Sleep(time.Second)
		w.expect("sleep d")
		w.unloaded("d")

		// And one that is pinned stays, and is tried again later.
		e := w.load("e", Need{Weights: 50})
		e.SetPinned(true)
		e.Sleep()
		time.Sleep(time.Second)
		w.expect("sleep e")
		time.Sleep(12 * time.Second)
		w.expect("sleep e")
		w.unloaded()
	})
}

func TestModelLargerThanTheLimit(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		w.load("a", Need{Weights: 40, Context: 10})
		w.load("b", Need{Weights: 20, Context: 10})
		w.children["b"].SetPinned(true)
		time.Sleep(5 * time.Second)
		large, err := w.m.Admit(w.Context(), Request{Model: "l", Need: Need{Weights: 500}})
		if err != nil {
			w.Fatal(err)
		}
		w.expect("sleep a", "sleep b")
		w.unloaded("a") // as stock would
		if s := w.slot(large); s.Lease != 90 {
			w.Errorf("lease %d of a limit of 100 with 10 in use for good", s.Lease)
		}
		large.Free()

		var full *LimitError
		if _, err := w.admit("m", Request{Need: Need{Weights: 101}}, time.Minute); !errors.As(err, &full) || full.FitsAlone() {
			w.Errorf("%v", err)
		}
		w.expect()
		w.idle()
	})
}

func TestLimitSetByOthers(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b := w.load("a", Need{Weights: 40}), w.load("b", Need{Weights: 40})
		time.Sleep(5 * time.Second)
		if _, err := w.l.SetLimit(w.m.Group(), 60); err != nil {
			w.Fatal(err)
		}
		w.expect("sleep a")
		if stats, err := w.m.Stats(); err != nil || stats[0].Limit != 60 || stats[0].State != StateAsleep || stats[1].State != StateAwake {
			w.Errorf("%+v, %v", stats, err)
		}
		var full *LimitError
		if _, err := w.admit("c", Request{Need: Need{Weights: 61}}, time.Minute); !errors.As(err, &full) || full.Limit != 60 || full.Source == "a test" {
			w.Errorf("%v", err)
		}
		if limit, charged, err := w.m.Budget(Device{ID: HostID}); limit != 60 || charged != 40 || err != nil {
			w.Errorf("%d, %d, %v", limit, charged, err)
		}

		// The ledger forgets the limit with the last slot, this server does not.
		a.Free()
		b.Free()
		w.l.mu.Lock()
		clear(w.l.limits)
		w.l.mu.Unlock()
		if _, err := w.admit("c", Request{Need: Need{Weights: 61}}, time.Minute); !errors.As(err, &full) {
			w.Errorf("%v", err)
		}

		// More room helps who waits.
		d := w.load("d", Need{Weights: 60})
		d.Begin()
		done := make(chan error)
		go func() {
			_, err := w.admit("e", Request{Need: Need{Weights: 50}}, time.Minute)
			done <- err
		}()
		synctest.Wait()
		if _, err := w.l.SetLimit(w.m.Group(), 110); err != nil {
			w.Fatal(err)
		}
		if err := <-done; err != nil {
			w.Error(err)
		}
		w.expect()
		w.idle()
	})
}

// Under the limit of all groups nobody is refused for memory that others have: it may come back.
func TestOthersHaveTheMemory(t *testing.T) {
	inWorld(t, NoLimit, func(w *world) {
		if _, err := w.l.SetLimit("", 100); err != nil {
			w.Fatal(err)
		}
		other, err := w.l.Lease("ollama-2", "other", 70, 0, NoLimit)
		if err != nil {
			w.Fatal(err)
		}
		time.AfterFunc(20*time.Second, func() { _ = w.l.Unlease(other) })
		start := time.Now()
		w.load("a", Need{Weights: 50})
		if waited := time.Since(start); waited < 20*time.Second || waited > 22*time.Second {
			w.Errorf("waited %v", waited)
		}
		var full *LimitError
		if _, err := w.admit("b", Request{Need: Need{Weights: 101}}, time.Minute); !errors.As(err, &full) {
			w.Errorf("%v", err)
		}
		w.idle()
	})
}
