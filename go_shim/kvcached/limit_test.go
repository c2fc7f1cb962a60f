//go:build go1.25

package kvcached

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// The limit is in the ledger from the first lease on, and is changed there.
func TestLimitIsInTheLedger(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		group := w.m.Group()
		limit := func() Limit { l, _ := w.l.Limit(group); return l }
		if got := limit(); got.Revision != 0 {
			w.Errorf("before a lease: %+v", got)
		}
		a := w.load("a", Need{Weights: 40})
		if got := limit(); got.Revision != 1 || got.Bytes != 100 {
			w.Errorf("after a lease: %+v", got)
		}
		b := w.load("b", Need{Weights: 50})
		if got := limit(); got.Revision != 1 {
			w.Errorf("set again: %+v", got)
		}

		// Somebody lowers it: the model that was idle for longer gives way, and the next is admitted under it.
		time.Sleep(3 * time.Second)
		_, _ = w.l.SetLimit(group, 60)
		time.Sleep(3 * time.Second)
		w.expect("sleep a")
		if limit, charged, err := w.m.Budget(Device{ID: HostID}); limit != 60 || charged != 50 || err != nil {
			w.Error(limit, charged, err)
		}
		var refusal *LimitError
		if _, err := w.admit("c", Request{Need: Need{Weights: 61}}, time.Minute); !errors.As(err, &refusal) || refusal.Limit != 60 {
			w.Errorf("%v", err)
		}

		// The ledger forgets it with the group's last slot, this server does not.
		a.Free()
		b.Free()
		if got := limit(); got.Revision != 0 {
			w.Errorf("after the last: %+v", got)
		}
		w.load("a", Need{Weights: 40})
		if got := limit(); got.Revision != 1 || got.Bytes != 60 {
			w.Errorf("anew: %+v", got)
		}

		// It is taken away.
		_, _ = w.l.SetLimit(group, NoLimit)
		w.load("huge", Need{Weights: 1 << 40})
	})
}

// The ledger counts in small pages: what it made of the limit is nobody's command.
func TestLimitIsRoundedByTheLedger(t *testing.T) {
	inWorld(t, 20_000_000_000, func(w *world) {
		w.l.round = true
		w.load("a", Need{Weights: 1 << 30})
		time.Sleep(2 * time.Second)
		w.m.mu.Lock()
		defer w.m.mu.Unlock()
		if p := w.m.host; p.changed || p.source != "a test" || p.limit != 20_000_000_000 {
			w.Errorf("changed %v by %s to %d", p.changed, p.source, p.limit)
		}
	})
}

// A limit that somebody set before the server looked is not overwritten; without one there is nothing to say.
func TestLimitSetByOthersStays(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		_, _ = w.l.SetLimit(w.m.Group(), 70)
		w.load("a", Need{Weights: 40})
		if got, _ := w.l.Limit(w.m.Group()); got.Revision != 1 || got.Bytes != 70 {
			w.Errorf("%+v", got)
		}
	})
	inWorld(t, NoLimit, func(w *world) {
		w.load("a", Need{Weights: 40})
		if got, _ := w.l.Limit(w.m.Group()); got.Revision != 0 {
			w.Errorf("%+v", got)
		}
	})
}

// A child that hangs on its way to sleep does not keep others from waking.
func TestWakePassesOneWhoseSleepHangs(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 40})
		b := w.load("b", Need{Weights: 40})
		time.Sleep(3 * time.Second)
		b.Sleep()
		w.expect("sleep b")

		w.l.mu.Lock()
		w.l.took[CommandSleep] = sleepWait + time.Second
		w.l.mu.Unlock()
		a.Sleep()
		w.expect("sleep a")
		go func() { _ = w.request(w.Context(), a, time.Second) }()
		synctest.Wait()

		start := time.Now()
		ctx, cancel := context.WithTimeout(w.Context(), sleepCounts+5*time.Second)
		defer cancel()
		if err := w.request(ctx, b, time.Second); err != nil {
			w.Errorf("after %v: %v", time.Since(start), err)
		}
		w.expect("wake b")
		time.Sleep(sleepWait)
		w.idle()
	})
}

// Whole is about each device by itself.
func TestWhole(t *testing.T) {
	inWorld(t, 1000, func(w *world) {
		gpus := []Device{{ID: "0000:01:00.0", Total: 1000, Free: 900}, {ID: "0000:02:00.0", Total: 1000, Free: 900}}
		w.m.SetDevices(gpus)
		admit := func(weights uint64) *KVCache {
			c, err := w.m.Admit(w.Context(), Request{Model: "m", Need: Need{Weights: weights, Context: 100}, Devices: gpus})
			if err != nil {
				w.Fatal(err)
			}
			c.Begin()
			c.End()
			return c
		}
		c := admit(1000)
		if !c.Whole() {
			w.Errorf("its leases are %d", c.leased())
		}
		c.Free()
		// 2 x 950 of 2 x 1000 that are asked for: more than the need in one place, and not the whole.
		if c = admit(1900); c.Whole() || c.leased() <= c.Need().Total()-200 {
			w.Errorf("whole with leases of %d", c.leased())
		}
		c.Free()
	})
}

// A model that was put to sleep in its turn, and whose request has gone meanwhile, sleeps on: nobody gives way to it.
func TestASleeperWhoseRequestHasGoneSleepsOn(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b := w.load("a", Need{Weights: 50}), w.load("b", Need{Weights: 50})
		for _, c := range []*KVCache{a, b} {
			w.l.set(c.Slot(), func(s *Slot) { s.Lease = 0 })
		}
		time.Sleep(5 * time.Second)
		a.Begin()
		time.Sleep(10 * time.Millisecond)
		b.Begin()
		grown := make(chan error, 2)
		go func() { grown <- w.l.grow(a.Slot(), 10) }()
		time.Sleep(10 * time.Millisecond)
		go func() { grown <- w.l.grow(b.Slot(), 10) }()
		time.Sleep(2 * time.Second)
		w.expect("sleep b")
		b.End() // the client has gone; its claim stays parked in the child
		if err := <-grown; err != nil {
			w.Error(err)
		}
		a.End()
		time.Sleep(20 * time.Second)
		w.expect()
		if s := w.slot(b); s.Parked == 0 || s.Asleep != 50 {
			w.Errorf("%+v", s)
		}
		w.idle()

		// The next request wakes it, and what was parked goes on.
		if err := w.request(w.Context(), b, time.Second); err != nil {
			w.Error(err)
		}
		if err := <-grown; err != nil {
			w.Error(err)
		}
		w.expect("sleep a", "wake b")
		w.idle()
	})
}

// A model that fails to sleep, and may not be unloaded, does not keep those who wait from an answer.
func TestAVictimThatCannotSleepKeepsNobody(t *testing.T) {
	for _, noHostMemory := range []bool{true, false} {
		inWorld(t, 100, func(w *world) {
			a := w.load("a", Need{Weights: 70})
			a.SetPinned(true)
			if noHostMemory {
				w.l.hostRoom = 0
			} else {
				w.l.answer = func(string, Command) error { return ErrSlot }
			}
			time.Sleep(5 * time.Second)
			var limit *LimitError
			start := time.Now()
			if _, err := w.admit("b", Request{Need: Need{Weights: 50}}, 5*time.Minute); !errors.As(err, &limit) || !limit.FitsAlone() {
				w.Errorf("%v", err)
			}
			if took := time.Since(start); took > 20*time.Second {
				w.Errorf("it was told after %v", took)
			}
			// One that can spill gets what there is.
			c, err := w.m.Admit(w.Context(), Request{Model: "c", Need: Need{Weights: 50}})
			if err != nil || c.leased() != 30 || c.Whole() {
				w.Errorf("%v, %v", c, err)
			}
		})
	}
}
