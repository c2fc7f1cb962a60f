//go:build go1.25

package kvcached

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var twoGPUs = []Device{
	{ID: "00000000:01:00.0", Name: "CUDA0", Total: 1000, Free: 600},
	{ID: "0000:02:00.0", Name: "CUDA1", Total: 1000, Free: 200},
}

// onGPUs runs a test on two GPUs, with a limit on each and none on host memory.
func onGPUs(t *testing.T, limit uint64, test func(*world)) {
	inWorld(t, limit, func(w *world) {
		w.m.SetDevices(twoGPUs)
		test(w)
	}, func(m *Manager) { m.named = "/dev/shm/fake" })
}

func (w *world) gpu(i int) *fakeLedger {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	return w.m.pools[1+i].ledger.(*fakeLedger)
}

// loadOn is load on some devices.
func (w *world) loadOn(name string, need Need, devices ...Device) *KVCache {
	w.Helper()
	c, err := w.admit(name, Request{Need: need, Devices: devices}, time.Hour)
	if err != nil {
		w.Fatalf("%s: %v", name, err)
	}
	w.attach(c)
	c.Begin()
	time.Sleep(time.Millisecond)
	c.End()
	synctest.Wait()
	return c
}

func TestSharesOfSeveralDevices(t *testing.T) {
	onGPUs(t, 800, func(w *world) {
		c := w.loadOn("a", Need{Weights: 400, Outside: 400, Context: 50}, twoGPUs...)
		w.m.mu.Lock()
		defer w.m.mu.Unlock()
		// 400 by 550 and 150 of free memory that is not a context's
		first, second, host := c.parts[0], c.parts[1], c.parts[2]
		if first.pool.device.ID != "0000:01:00.0" || first.seen.Lease != 365 || first.seen.Fixed != 50 || first.limit != 800 {
			w.Errorf("%+v", first.seen)
		}
		if second.pool.device.ID != "0000:02:00.0" || second.seen.Lease != 136 || second.seen.Fixed != 50 {
			w.Errorf("%+v", second.seen)
		}
		if host.pool != w.m.host || host.main || host.limit != NoLimit || host.seen.Lease != hostLease {
			w.Errorf("%+v", host.seen)
		}
	})
}

// What a child measured of its context stands in for what was assumed.
func TestContextAsMeasured(t *testing.T) {
	onGPUs(t, 800, func(w *world) {
		a := w.loadOn("a", Need{Weights: 100, Context: 50}, twoGPUs[0])
		w.gpu(0).set(a.Slot(), func(s *Slot) { s.Fixed, s.Context = 30, 30 })
		synctest.Wait()
		b := w.loadOn("b", Need{Weights: 100, Context: 50}, twoGPUs[0])
		if s := w.slot(b); s.Lease != 130 || s.Fixed != 30 || b.Need().Context != 30 {
			w.Errorf("%+v", s)
		}
		c := w.load("c", Need{Weights: 100}) // none in host memory
		if s := w.slot(c); s.Lease != 100 {
			w.Errorf("%+v", s)
		}
	})
}

func TestEnvironmentOfSeveralDevices(t *testing.T) {
	onGPUs(t, 800, func(w *world) {
		w.loadOn("x", Need{Weights: 10}, twoGPUs[1])
		c := w.loadOn("a", Need{Weights: 400}, twoGPUs...)
		want := "0000:01:00.0,0,800,/dev/shm/fake.0000:01:00.0;0000:02:00.0,1,800,/dev/shm/fake.0000:02:00.0;host,1,18446744073709551615,/dev/shm/fake"
		env := c.Env()
		if env[LeasesVariable] != want {
			w.Errorf("%s", env[LeasesVariable])
		}
		if _, single := env[SlotVariable]; single || env[GroupVariable] != w.m.Group() || env[SleepsVariable] != "1" {
			w.Errorf("%v", env)
		}
		stats, err := w.m.Stats()
		if err != nil || len(stats) != 2 || !stats[0].OnGPU || stats[0].VRAM != 402 || stats[0].Limit != 800 {
			w.Errorf("%+v, %v", stats, err)
		}
	})
}

// What is missing on one device moves the model from all of its devices, and it comes back to all.
func TestSleepAndWakeOnSeveralDevices(t *testing.T) {
	onGPUs(t, 300, func(w *world) {
		a := w.loadOn("a", Need{Weights: 400, Context: 20}, twoGPUs...)
		time.Sleep(5 * time.Second)
		b := w.loadOn("b", Need{Weights: 200}, twoGPUs[1])
		for i := range 2 {
			if got := w.gpu(i).slots[0]; got.Asleep == 0 || got.Charge != 20 {
				w.Errorf("GPU %d: %+v", i, got)
			}
		}
		time.Sleep(5 * time.Second)
		if err := w.request(w.Context(), a, time.Second); err != nil {
			w.Error(err)
		}
		for i := range 2 {
			if got := w.gpu(i).slots[0]; got.Asleep != 0 {
				w.Errorf("GPU %d: %+v", i, got)
			}
		}
		if b.State() != StateAsleep {
			w.Errorf("b is %s", b.State())
		}
		w.idle()
	})
}

func TestLimitOfAGPU(t *testing.T) {
	onGPUs(t, 300, func(w *world) {
		var full *LimitError
		_, err := w.admit("a", Request{Need: Need{Weights: 290, Context: 20}, Devices: twoGPUs[:1]}, time.Minute)
		if !errors.As(err, &full) || full.Device != "CUDA0" || !strings.Contains(err.Error(), "context 20 bytes) on CUDA0") {
			w.Errorf("%v", err)
		}
		if limit, charged, err := w.m.Budget(twoGPUs[0]); limit != 300 || charged != 0 || err != nil {
			w.Errorf("%d, %d, %v", limit, charged, err)
		}
		// Host memory has no limit beside GPUs.
		w.load("b", Need{Weights: 5000})
	})
	onGPUs(t, NoLimit, func(w *world) {
		if limit, _, err := w.m.Budget(twoGPUs[0]); limit != 950 || err != nil {
			w.Errorf("%d, %v", limit, err)
		}
		var full *LimitError
		if _, err := w.admit("a", Request{Need: Need{Weights: 951}, Devices: twoGPUs[:1]}, time.Minute); !errors.As(err, &full) || !strings.Contains(err.Error(), "95 %") {
			w.Errorf("%v", err)
		}
	})
}

func TestDeviceWithoutALedger(t *testing.T) {
	inWorld(t, 100, func(w *world) {
		w.m.library.(*fakeLibrary).fail = errTorn
		w.m.SetDevices(twoGPUs)
		if _, err := w.admit("a", Request{Need: Need{Weights: 1}, Devices: twoGPUs}, time.Hour); !errors.Is(err, errTorn) || !strings.Contains(err.Error(), "0000:01:00.0") {
			w.Errorf("%v", err)
		}
		if _, _, err := w.m.Budget(twoGPUs[1]); !errors.Is(err, errTorn) {
			w.Errorf("%v", err)
		}
		w.load("b", Need{Weights: 100}) // the host goes on as before
	})
}

// Clients ask at random for models on one device, on the other, and on both. Nobody waits for ever, nobody is disturbed.
func TestStormOfRequests(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { storm(t, seed) })
	}
}

func storm(t *testing.T, seed uint64) {
	onGPUs(t, 300, func(w *world) {
		for i := range 2 {
			w.gpu(i).took = map[Command]time.Duration{CommandSleep: 50 * time.Millisecond, CommandWake: 100 * time.Millisecond}
		}
		var models []*KVCache
		for i, devices := range [][]Device{twoGPUs[:1], twoGPUs[1:], twoGPUs, twoGPUs[:1], twoGPUs[1:], twoGPUs} {
			need := Need{Weights: 150, Context: 10}
			if len(devices) == 2 {
				need.Weights = 300
			}
			models = append(models, w.loadOn(string(rune('a'+i)), need, devices...))
			models[i].SetPinned(true)
		}
		done := make(chan error, 8)
		for client := range uint64(8) {
			go func() {
				random := rand.New(rand.NewPCG(seed, client))
				for range 50 {
					c := models[random.IntN(len(models))]
					if err := w.request(w.Context(), c, time.Duration(random.IntN(2000))*time.Millisecond); err != nil {
						done <- fmt.Errorf("%s: %w", c.name, err)
						return
					}
					time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
				}
				done <- nil
			}()
		}
		start := time.Now()
		for range 8 {
			if err := <-done; err != nil {
				w.Error(err)
			}
		}
		if took := time.Since(start); took > 15*time.Minute {
			w.Errorf("%v for 400 requests of a second", took)
		}
		w.unloaded()
		w.idle()
	})
}

// Requests grow their models' caches beyond the limit at every step, some are cancelled: all that go on are answered.
func TestStormOfClaims(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { stormOfClaims(t, seed) })
	}
}

func stormOfClaims(t *testing.T, seed uint64) {
	inWorld(t, 260, func(w *world) {
		w.l.took = map[Command]time.Duration{CommandSleep: 50 * time.Millisecond, CommandWake: 100 * time.Millisecond}
		var models []*KVCache
		var growing [6]chan struct{} // one answer a model at a time; a lock would stop the clock
		for i := range growing {
			growing[i] = make(chan struct{}, 1)
			models = append(models, w.load(string(rune('a'+i)), Need{Weights: 100, Context: 5}))
			models[i].SetPinned(true)
		}
		answer := func(ctx context.Context, i int, steps int) error {
			c := models[i]
			c.Begin()
			defer c.End()
			if err := c.Awake(ctx); err != nil {
				return err
			}
			growing[i] <- struct{}{}
			defer func() { <-growing[i] }()
			grown := 0
			for range steps {
				if err := w.l.grow(c.Slot(), 10); err != nil {
					return err
				}
				grown += 10
				time.Sleep(200 * time.Millisecond)
			}
			w.l.set(c.Slot(), func(s *Slot) { s.Claim -= uint64(grown); s.Charge = charge(*s) })
			return nil
		}
		done := make(chan error, 8)
		for client := range uint64(8) {
			go func() {
				random := rand.New(rand.NewPCG(seed, client))
				for range 30 {
					ctx, cancel := context.WithCancel(w.Context())
					if random.IntN(4) == 0 {
						time.AfterFunc(time.Duration(random.IntN(3000))*time.Millisecond, cancel)
					}
					i := random.IntN(len(models))
					err := answer(ctx, i, 1+random.IntN(8))
					cancel()
					if err != nil && !errors.Is(err, context.Canceled) {
						done <- fmt.Errorf("%s: %w", models[i].name, err)
						return
					}
				}
				done <- nil
			}()
		}
		for range 8 {
			if err := <-done; err != nil {
				w.Error(err)
			}
		}
		w.unloaded()
		w.idle()
	})
}
