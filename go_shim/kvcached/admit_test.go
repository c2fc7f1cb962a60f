//go:build go1.25

package kvcached

import (
	"context"
	"errors"
	"testing"
	"time"
)

// The scheduler loads one model after the other: a lease for the next must not be in the way of one that loads.
func TestOneLoadAtATime(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		sleeper := w.load("s", Need{Weights: 40})
		sleeper.Sleep()
		time.Sleep(time.Second)
		a, err := w.admit("a", Request{Need: Need{Weights: 20}}, time.Second)
		if err != nil {
			w.Fatal(err)
		}
		admitted := make(chan error, 1)
		go func() {
			_, err := w.admit("b", Request{Need: Need{Weights: 20}}, time.Hour)
			admitted <- err
		}()
		time.Sleep(10 * time.Second)
		if len(admitted) > 0 {
			w.Fatal("b has its lease while a loads")
		}
		if err := w.request(w.Context(), sleeper, 0); err != nil { // a wake need not wait for it
			w.Error(err)
		}
		w.attach(a)
		if err := w.l.grow(a.Slot(), 30); err != nil {
			w.Error(err)
		}
		a.Begin()
		a.End()
		if err := <-admitted; err != nil {
			w.Error(err)
		}
		w.idle()
	})
	inWorld(t, NoLimit, func(w *world) { // nothing can be in the way
		for _, name := range []string{"a", "b"} {
			if _, err := w.admit(name, Request{Need: Need{Weights: 20}}, time.Second); err != nil {
				w.Error(err)
			}
		}
	})
}

func TestAdmitEndsWithItsContext(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		a := w.load("a", Need{Weights: 60})
		a.Begin()
		start := time.Now()
		if c, err := w.admit("b", Request{Need: Need{Weights: 60}}, time.Minute); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			w.Errorf("%v, %v after %v", c, err, time.Since(start))
		}
		w.idle()
		a.End()
		time.Sleep(5 * time.Second)
		w.expect()
		if len(w.l.slots) != 1 {
			w.Errorf("%+v", w.l.slots)
		}
	})
}
