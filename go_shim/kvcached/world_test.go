//go:build go1.25

package kvcached

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// world is a manager on ledgers in memory, on a clock that goes as fast as everybody waits. Models are named by letters.
type world struct {
	*testing.T
	m *Manager
	l *fakeLedger // of host memory

	mu       sync.Mutex
	unloads  []string
	refuse   bool // the scheduler says that models are in use
	children map[string]*KVCache
}

// inWorld runs a test with a limit of host memory and settings changed as given.
func inWorld(t *testing.T, limit uint64, test func(*world), tune ...func(*Manager)) {
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLedger("/dev/shm/fake")
		gpus := map[string]*fakeLedger{}
		for _, id := range []string{"0000:01:00.0", "0000:02:00.0"} {
			gpus["/dev/shm/fake."+id] = newFakeLedger("/dev/shm/fake." + id)
		}
		m, err := Open(Settings{Enabled: true, Limit: limit, Source: "a test", Sleep: time.Hour}, &fakeLibrary{ledger: l, others: gpus}, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, change := range tune {
			change(m)
		}
		w := &world{T: t, m: m, l: l, children: map[string]*KVCache{}}
		m.OnUnload(func(model string) bool {
			w.mu.Lock()
			w.unloads = append(w.unloads, model)
			no := w.refuse
			c := w.children[model]
			w.mu.Unlock()
			if no {
				return false
			}
			go func() {
				time.Sleep(10 * time.Millisecond) // the process ends
				c.Free()
			}()
			return true
		})
		test(w)
		m.Close()
	})
}

// admit asks for room and gives up after a while.
func (w *world) admit(name string, r Request, patience time.Duration) (*KVCache, error) {
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	r.Model, r.Name, r.Whole = name, name, true
	return w.m.Admit(ctx, r)
}

// load admits a model and has its child map all of its need.
func (w *world) load(name string, need Need) *KVCache {
	w.Helper()
	c, err := w.admit(name, Request{Need: need}, time.Minute)
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

// attach is the child's start: it opens its slots and maps its need.
func (w *world) attach(c *KVCache) {
	w.mu.Lock()
	w.children[c.model] = c
	w.mu.Unlock()
	w.m.mu.Lock()
	parts := slices.Clone(c.parts)
	w.m.mu.Unlock()
	for _, part := range parts {
		if part.main {
			part.pool.ledger.(*fakeLedger).set(part.slot, func(s *Slot) {
				s.Attached, s.Controlled, s.Claim = true, true, s.Lease-s.Fixed
				s.Weights = s.Claim
			})
		}
	}
}

// request holds a model for a while, as the scheduler and its child do.
func (w *world) request(ctx context.Context, c *KVCache, takes time.Duration) error {
	c.Begin()
	defer c.End()
	if err := c.Awake(ctx); err != nil {
		return err
	}
	if s := w.slot(c); s.Asleep > 0 {
		w.Errorf("%s was handed over asleep", c.name)
	}
	time.Sleep(takes)
	if s := w.slot(c); s.Asleep > 0 && s.Parked == 0 {
		w.Errorf("%s was put to sleep under a request", c.name)
	}
	return nil
}

// slot is a model's on its first device.
func (w *world) slot(c *KVCache) Slot {
	w.m.mu.Lock()
	if len(c.parts) == 0 {
		w.m.mu.Unlock()
		return Slot{}
	}
	l, index := c.parts[0].pool.ledger.(*fakeLedger), c.parts[0].slot
	w.m.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.at(index); s != nil {
		return *s
	}
	return Slot{}
}

func (w *world) asleep(c *KVCache) bool { return w.slot(c).Asleep > 0 }

// expect compares the commands given since the last time, in any order: those of one decision are given together.
func (w *world) expect(want ...string) {
	w.Helper()
	synctest.Wait()
	w.l.mu.Lock()
	got := w.l.commands
	w.l.commands = nil
	w.l.mu.Unlock()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		w.Errorf("commands %q, want %q", got, want)
	}
}

// unloaded compares the models that the scheduler was asked to unload since the last time.
func (w *world) unloaded(want ...string) {
	w.Helper()
	synctest.Wait()
	w.mu.Lock()
	got := w.unloads
	w.unloads = nil
	w.mu.Unlock()
	if !slices.Equal(got, want) {
		w.Errorf("unloaded %q, want %q", got, want)
	}
}

// idle says that nobody waits and nothing is left over of those who did.
func (w *world) idle() {
	w.Helper()
	synctest.Wait()
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	for _, p := range w.m.pools {
		if len(p.queue) > 0 || p.waking != nil {
			w.Errorf("%s: %d in the queue, waking %v", p.device.ID, len(p.queue), p.waking)
		}
	}
	for c := range w.m.caches {
		if c.wake != nil || c.waiting != 0 || c.sleeping != 0 || c.draining() {
			w.Errorf("%s: wake %v, waiting %d, sleeping %v, draining %v", c.name, c.wake, c.waiting, c.sleeping, c.draining())
		}
	}
}
