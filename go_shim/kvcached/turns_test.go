//go:build go1.25

package kvcached

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// asleepAll loads models of 60 under a limit of 100, so that one is awake at a time, and leaves all of them asleep.
func (w *world) asleepAll(names ...string) []*KVCache {
	w.Helper()
	var list []*KVCache
	for _, name := range names {
		c := w.load(name, Need{Weights: 60})
		time.Sleep(5 * time.Second)
		list = append(list, c)
		c.Sleep()
		time.Sleep(time.Second)
	}
	w.l.mu.Lock()
	w.l.commands = nil
	w.l.mu.Unlock()
	for _, c := range list {
		if !w.asleep(c) {
			w.Fatalf("%s is awake", c.name)
		}
	}
	return list
}

func TestWakesInOrderOfArrival(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b", "c", "d")
		w.l.took[CommandWake] = time.Second
		order := make(chan string, 4)
		for _, i := range []int{2, 0, 3, 1} {
			go func() {
				if err := w.request(w.Context(), list[i], 3*time.Second); err != nil {
					w.Error(err)
				}
				order <- list[i].name
			}()
			time.Sleep(10 * time.Millisecond)
		}
		got := <-order + <-order + <-order + <-order
		if got != "cadb" {
			w.Errorf("order %s", got)
		}
		w.expect("wake c", "sleep c", "wake a", "sleep a", "wake d", "sleep d", "wake b")
		w.idle()
	})
}

// With room for all of them, they wake one after the other all the same: a bus is shared by no more than one copy.
func TestOneWakeAtATime(t *testing.T) {
	inWorld(t, 1000, func(w *world) {
		list := w.asleepAll("a", "b", "c")
		w.l.took[CommandWake] = time.Second
		start := time.Now()
		done := make(chan time.Duration, 3)
		for _, c := range list {
			go func() {
				if err := w.request(w.Context(), c, 0); err != nil {
					w.Error(err)
				}
				done <- time.Since(start).Round(time.Second)
			}()
		}
		for want := time.Second; want <= 3*time.Second; want += time.Second {
			if got := <-done; got != want {
				w.Errorf("awake after %v, want %v", got, want)
			}
		}
		w.idle()
	})
}

// Several requests for one sleeper wake it once; one that goes leaves the others their place.
func TestRequestsShareAWake(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b")
		w.l.took[CommandWake] = time.Second
		b := list[1]
		go func() { _ = w.request(w.Context(), b, 10*time.Second) }()
		time.Sleep(2 * time.Second)

		ctx, cancel := context.WithCancel(w.Context())
		first := make(chan error, 1)
		go func() { first <- w.request(ctx, list[0], 0) }()
		second := make(chan error, 1)
		time.Sleep(time.Second)
		go func() { second <- w.request(w.Context(), list[0], 0) }()
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			w.Errorf("%v", err)
		}
		if err := <-second; err != nil {
			w.Error(err)
		}
		w.expect("wake b", "sleep b", "wake a")
		w.idle()
	})
}

// A wakes for a request that is cancelled, another waits, B is done: B's memory must be found.
func TestACancelledRequestLeavesNoGap(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b", "c")
		a, b, c := list[0], list[1], list[2]
		b.Begin()
		if err := b.Awake(w.Context()); err != nil {
			w.Fatal(err)
		}
		time.Sleep(5 * time.Second)

		ctx, cancel := context.WithCancel(w.Context())
		cancelled := make(chan error, 1)
		go func() { cancelled <- w.request(ctx, a, time.Second) }()
		time.Sleep(time.Second)
		served := make(chan error, 1)
		go func() { served <- w.request(w.Context(), c, time.Second) }()
		time.Sleep(time.Second)
		if a.State() != StateWaking || c.State() != StateWaking || b.State() != StateAwake {
			w.Errorf("%s, %s, %s", a.State(), b.State(), c.State())
		}
		go b.End()
		go cancel()
		if err := <-cancelled; err != nil && !errors.Is(err, context.Canceled) {
			w.Error(err)
		}
		if err := <-served; err != nil {
			w.Error(err)
		}
		w.idle()
		if w.asleep(c) || !w.asleep(b) {
			w.Error("c is to be awake, and b asleep")
		}
	})
}

// All that are in use wait for room: the one that came last sleeps, the first goes on, and the other has its turn after it.
func TestParkedModelsTakeTurns(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a, b := w.load("a", Need{Weights: 50}), w.load("b", Need{Weights: 50})
		for _, c := range []*KVCache{a, b} {
			w.l.set(c.Slot(), func(s *Slot) { s.Lease = 0 })
		}
		time.Sleep(5 * time.Second)
		grow := func(c *KVCache, works time.Duration, done chan<- error) {
			err := c.Awake(w.Context())
			for range 3 { // each step of the cache needs more
				if err == nil {
					err = w.l.grow(c.Slot(), 10)
					time.Sleep(works)
				}
			}
			w.l.set(c.Slot(), func(s *Slot) { s.Claim -= min(s.Claim, 30); s.Charge = charge(*s) })
			c.End()
			done <- err
		}
		first, second := make(chan error, 1), make(chan error, 1)
		a.Begin()
		time.Sleep(10 * time.Millisecond)
		b.Begin()
		go grow(a, time.Second, first)
		time.Sleep(10 * time.Millisecond)
		go grow(b, time.Second, second)
		time.Sleep(2 * time.Second)
		w.expect("sleep b")
		if s := w.slot(b); s.Parked == 0 || s.Asleep != 50 {
			w.Errorf("%+v", s)
		}
		if err := <-first; err != nil {
			w.Errorf("a: %v", err)
		}
		select {
		case <-second:
			w.Error("b was through before a")
		default:
		}
		if err := <-second; err != nil {
			w.Errorf("b: %v", err)
		}
		w.expect("sleep a", "wake b") // no going back and forth at every step
		w.idle()
	})
}

// The first comer waits in the queue, the one that is in use lacks room after it: it gives way.
func TestAParkedModelGivesWayToWhoCameBefore(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b", "c")
		a, b, c := list[0], list[1], list[2]
		c.SetPinned(true)
		w.l.set(c.Slot(), func(s *Slot) { s.Fixed, s.Context, s.Charge = 10, 10, 10 })
		b.Begin()
		if err := b.Awake(w.Context()); err != nil {
			w.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		served := make(chan error, 1)
		go func() { served <- w.request(w.Context(), a, 5*time.Second) }()
		synctest.Wait()
		w.expect("wake b")
		time.Sleep(time.Millisecond)
		b.End()
		b.Begin() // at once another, which came after a's
		grown := make(chan error, 1)
		go func() {
			grown <- w.l.grow(b.Slot(), 35)
			b.End()
		}()
		time.Sleep(3 * time.Second)
		w.expect("sleep b", "wake a")
		if err := <-served; err != nil {
			w.Error(err)
		}
		// Beside c's context it can never have that much.
		if err := <-grown; !errors.Is(err, ErrLimit) {
			w.Error(err)
		}
		w.expect("sleep a", "wake b", "refuse b")
		w.idle()
	})
}

// A claim that nothing could help is refused, and does not wait for the end of its time.
func TestAHopelessClaimIsRefused(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 30, Context: 30})
		a.SetPinned(true)
		b := w.load("b", Need{Weights: 30})
		time.Sleep(5 * time.Second)
		b.Begin()
		defer b.End()
		start := time.Now()
		if err := w.l.grow(b.Slot(), 45); !errors.Is(err, ErrLimit) {
			w.Errorf("%v", err)
		}
		if took := time.Since(start); took < settled || took > settled+3*time.Second {
			w.Errorf("after %v", took)
		}
		w.expect("sleep a", "refuse b")
		w.unloaded()

		// The next one is not held to it.
		if err := w.l.grow(b.Slot(), 40); err != nil {
			w.Errorf("%v", err)
		}
	})
}

// One that loads cannot sleep: beside it the other gives way, whoever came first.
func TestAParkedLoadGoesFirst(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 50})
		w.l.set(a.Slot(), func(s *Slot) { s.Lease = 0 })
		a.Begin()
		b, err := w.admit("b", Request{Need: Need{Weights: 50}}, time.Second)
		if err != nil {
			w.Fatal(err)
		}
		w.attach(b)
		grown := make(chan error, 2)
		go func() { grown <- w.l.grow(a.Slot(), 10); a.End() }()
		time.Sleep(time.Second)
		go func() {
			grown <- w.l.grow(b.Slot(), 20) // compute buffers
			b.Begin()
			b.End()
		}()
		for range 2 {
			if err := <-grown; err != nil {
				w.Error(err)
			}
		}
		w.expect("sleep a", "sleep b", "wake a")
		w.idle()
	})
}

// New requests for a model that is never free wait behind one that has waited long enough.
func TestAStreamOfRequestsStarvesNobody(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b")
		ctx, cancel := context.WithCancel(w.Context())
		var answers atomic.Int32
		stopped := make(chan struct{})
		go func() { // requests overlap: there is always one
			defer close(stopped)
			for ctx.Err() == nil {
				go func() {
					if err := w.request(w.Context(), list[0], 3*time.Second); err != nil {
						w.Error(err)
					}
					answers.Add(1)
				}()
				time.Sleep(2 * time.Second)
			}
		}()
		time.Sleep(10 * time.Second)
		start := time.Now()
		if err := w.request(w.Context(), list[1], time.Second); err != nil {
			w.Fatal(err)
		}
		if waited := time.Since(start); waited < patience || waited > patience+6*time.Second {
			w.Errorf("waited %v", waited)
		}
		time.Sleep(10 * time.Second)
		cancel()
		<-stopped
		time.Sleep(20 * time.Second)
		if answers.Load() < 10 {
			w.Errorf("%d answers", answers.Load())
		}
		w.idle()
	})
}

func TestAwakeEndsWithItsContext(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b")
		list[0].Begin()
		if err := list[0].Awake(w.Context()); err != nil {
			w.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		if err := w.request(ctx, list[1], 0); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			w.Errorf("%v after %v", err, time.Since(start))
		}
		w.idle()
		w.expect("wake a")
		list[0].End()
		time.Sleep(5 * time.Second)
		w.expect()
	})
}

func TestAnEndedModelIsNotWaitedFor(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		list := w.asleepAll("a", "b")
		list[0].Begin()
		if err := list[0].Awake(w.Context()); err != nil {
			w.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- w.request(w.Context(), list[1], 0) }()
		time.Sleep(time.Second)
		list[1].Free() // its child was killed
		var ended *EndedError
		if err := <-done; !errors.As(err, &ended) || !strings.Contains(err.Error(), "model b") {
			w.Errorf("%v", err)
		}
		if err := list[1].Awake(w.Context()); !errors.As(err, &ended) {
			w.Errorf("%v", err)
		}
		list[0].End()
		w.idle()
	})
}
