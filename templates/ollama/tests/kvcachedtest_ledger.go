// Package kvcachedtest has a library with ledgers in memory, for tests of what is built on package kvcached.
package kvcachedtest

import (
	"slices"
	"sync"
	"time"

	"github.com/ollama/ollama/kvcached"
)

// Library has one ledger a path.
type Library struct {
	mu      sync.Mutex
	ledgers map[string]*Ledger
}

func (l *Library) Version() string                          { return "test" }
func (l *Library) LedgerPath(device string) (string, error) { return "/ledgers/" + device, nil }
func (l *Library) Monotonic() time.Duration                 { return time.Since(time.Unix(0, 0)) }

// OpenLedger opens a ledger; "" is that of host memory.
func (l *Library) OpenLedger(path string) (kvcached.Ledger, error) { return l.Ledger(path), nil }

// Ledger is the one at path, made when it is first asked for.
func (l *Library) Ledger(path string) *Ledger {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ledgers == nil {
		l.ledgers = map[string]*Ledger{}
	}
	if l.ledgers[path] == nil {
		l.ledgers[path] = &Ledger{path: path, rung: make(chan struct{})}
	}
	return l.ledgers[path]
}

// Close closes a manager that uses the library, without waiting for its next look at a ledger.
func (l *Library) Close(manager *kvcached.Manager) {
	done := make(chan struct{})
	go func() { manager.Close(); close(done) }()
	for {
		l.mu.Lock()
		for _, ledger := range l.ledgers {
			ledger.mu.Lock()
			ledger.ring()
			ledger.mu.Unlock()
		}
		l.mu.Unlock()
		select {
		case <-done:
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// Ledger keeps slots. It never gives a slot out twice, so that a stale one shows.
type Ledger struct {
	mu       sync.Mutex
	path     string
	next     int
	slots    []kvcached.Slot
	bell     uint32
	rung     chan struct{}
	commands []string
	answer   func(name string, command kvcached.Command) error
}

func (l *Ledger) ring() {
	l.bell++
	close(l.rung)
	l.rung = make(chan struct{})
}

func (l *Ledger) Path() string { return l.path }

func (l *Ledger) Slots() ([]kvcached.Slot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.slots), nil
}

func (l *Ledger) Lease(group, name string, size, fixed, limit uint64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var sum uint64
	for _, slot := range l.slots {
		sum += slot.Charge
	}
	if sum > limit || size > limit-sum {
		return -1, &kvcached.LibraryError{Code: -3, Name: "KVCACHED_E_LIMIT"}
	}
	l.next++
	l.slots = append(l.slots, kvcached.Slot{Index: l.next, Name: name, Group: group, Lease: size, Fixed: fixed, Charge: size, Limit: limit, Leased: true})
	l.ring()
	return l.next, nil
}

func (l *Ledger) Unlease(slot int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots = slices.DeleteFunc(l.slots, func(s kvcached.Slot) bool { return s.Index == slot })
	l.ring()
	return nil
}

func (l *Ledger) Wait(seen uint32, timeout time.Duration) (uint32, error) {
	l.mu.Lock()
	bell, rung := l.bell, l.rung
	l.mu.Unlock()
	if bell != seen {
		return bell, nil
	}
	select {
	case <-rung:
	case <-time.After(timeout):
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bell, nil
}

func (l *Ledger) SetLimit(string, uint64) (kvcached.Limit, error) { return kvcached.Limit{}, nil }
func (l *Ledger) Limit(string) (kvcached.Limit, error)            { return kvcached.Limit{}, nil }

// Answer sets what a child does before it carries a command out; an error is its answer instead. It may block.
func (l *Ledger) Answer(answer func(name string, command kvcached.Command) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answer = answer
}

// Command does with a slot's sizes what a child does: what it claims sleeps and wakes, its fixed part stays.
func (l *Ledger) Command(slot int, command kvcached.Command, _ time.Duration) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.at(slot)
	if s == nil || !s.Controlled {
		return 0, kvcached.ErrSlot
	}
	l.commands = append(l.commands, command.String()+" "+s.Name)
	if answer, name := l.answer, s.Name; answer != nil {
		l.mu.Unlock()
		err := answer(name, command)
		l.mu.Lock()
		if s = l.at(slot); s == nil {
			err = kvcached.ErrSlot
		}
		if err != nil {
			return 0, err
		}
	}
	before := s.Charge
	switch command {
	case kvcached.CommandSleep:
		s.Asleep, s.HostBytes = s.Asleep+s.Claim, s.HostBytes+s.Claim
		s.Claim, s.KV, s.Weights, s.Compute, s.Lease = 0, 0, 0, 0, 0
	case kvcached.CommandWake:
		s.Claim, s.Asleep, s.HostBytes = s.Claim+s.Asleep, 0, 0
		s.Weights = s.Claim
	}
	s.Charge = max(s.Lease, s.Fixed+s.Claim)
	l.ring()
	return before - min(before, s.Charge), nil
}

// Commands are those that were given so far, such as "sleep a:latest".
func (l *Ledger) Commands() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.commands)
}

func (l *Ledger) at(index int) *kvcached.Slot {
	i := slices.IndexFunc(l.slots, func(s kvcached.Slot) bool { return s.Index == index })
	if i < 0 {
		return nil
	}
	return &l.slots[i]
}

// Attach is a child that has opened its slot and claimed all of its lease.
func (l *Ledger) Attach(index int) {
	l.Set(index, func(s *kvcached.Slot) {
		s.Attached, s.Controlled = true, true
		s.Claim = s.Lease - min(s.Lease, s.Fixed)
		s.Weights = s.Claim
		s.KindReserved = [3]uint64{kvcached.KindKV: 8 * s.Lease}
	})
}

// Set changes a slot as its child would.
func (l *Ledger) Set(index int, change func(*kvcached.Slot)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.at(index); s != nil {
		change(s)
		s.Charge = max(s.Lease, s.Fixed+s.Claim)
		l.ring()
	}
}
