//go:build go1.25

package kvcached

import (
	"context"
	"errors"
	"math"
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

// Somebody else takes the room between the look and the lease: the model keeps its place, and half a lease does not stay.
func TestRoomThatIsGoneAgain(t *testing.T) {
	onGPUs(t, 800, func(w *world) {
		w.gpu(1).leases = []error{ErrLimit, ErrLimit}
		start := time.Now()
		c := w.loadOn("a", Need{Weights: 400}, twoGPUs...)
		if took := time.Since(start); took < 100*time.Millisecond || took > time.Second {
			w.Errorf("after %v", took)
		}
		if len(w.gpu(0).slots) != 1 || len(w.gpu(1).slots) != 1 || w.m.ByModel("a") != c || w.m.ByModel("b") != nil {
			w.Errorf("%+v, %+v", w.gpu(0).slots, w.gpu(1).slots)
		}

		full := &LibraryError{Name: "KVCACHED_E_FULL", Text: "the ledger has no free slot"}
		w.gpu(1).leases = []error{full}
		if _, err := w.admit("b", Request{Need: Need{Weights: 40}, Devices: twoGPUs}, time.Hour); !errors.Is(err, full) {
			w.Errorf("%v", err)
		}
		if len(w.gpu(0).slots) != 1 {
			w.Errorf("%+v", w.gpu(0).slots)
		}
		w.idle()
	})
}

func TestADeviceOfWhichMoreIsKnownLater(t *testing.T) {
	onGPUs(t, NoLimit, func(w *world) {
		w.m.SetRoomWait(7 * time.Second)
		third := Device{ID: "0000:03:00.0", Name: "CUDA2"}
		w.m.library.(*fakeLibrary).others["/dev/shm/fake.0000:03:00.0"] = newFakeLedger("/dev/shm/fake.0000:03:00.0")
		if limit, _, err := w.m.Budget(third); limit != NoLimit || err != nil {
			w.Errorf("%d, %v", limit, err)
		}
		third.Total, third.Free = 2000, 500
		w.m.SetDevices([]Device{third})
		if limit, _, err := w.m.Budget(third); limit != 1900 || err != nil {
			w.Errorf("%d, %v", limit, err)
		}
		c := w.loadOn("a", Need{Weights: 400}, third)
		for wait, want := range map[time.Duration]string{0: "4294967295", math.MaxInt64: "4294967295", 2000 * time.Hour: "4294967295", 8 * time.Second: "8000"} {
			w.m.SetRoomWait(wait)
			if got := c.Env()[RoomWaitVariable]; got != want {
				w.Errorf("%v: a child waits for %s ms, not %s", wait, got, want)
			}
		}
		w.m.SetRoomWait(7 * time.Second)
		if env := c.Env(); env[RoomWaitVariable] != "7000" || c.Model() != "a" {
			w.Errorf("%v", env)
		}
	})
}
