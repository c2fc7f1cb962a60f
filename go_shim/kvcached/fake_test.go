package kvcached

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// fakeLibrary keeps ledgers in memory, with the rules of the real ones for what this package relies on.
type fakeLibrary struct {
	ledger  *fakeLedger // of the path asked for first
	others  map[string]*fakeLedger
	path    string
	fail    error
	started time.Time
}

func (l *fakeLibrary) Version() string { return "fake" }

func (l *fakeLibrary) OpenLedger(path string) (Ledger, error) {
	if l.fail != nil {
		return nil, l.fail
	}
	if other := l.others[path]; other != nil {
		return other, nil
	}
	l.path = path
	return l.ledger, nil
}

func (l *fakeLibrary) LedgerPath(device string) (string, error) {
	return "/dev/shm/fake-" + device, nil
}

func (l *fakeLibrary) Monotonic() time.Duration { return monotonic() }

// The clock of these tests, never 0. In a bubble of synctest it is the bubble's.
func monotonic() time.Duration { return time.Since(time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)) }

type fakeLedger struct {
	mu       sync.Mutex
	path     string
	slots    []Slot
	limits   map[string]Limit
	fail     error
	bell     uint32
	rung     chan struct{} // closed and made anew at every ring
	commands []string      // "sleep a"
	took     map[Command]time.Duration
	answer   func(name string, command Command) error // before the command is done; nil: goes ahead
	refused  map[int]time.Duration                    // WantsSince of the claim
	hostRoom uint64                                   // for what sleeps
	leases   []error                                  // answers to the next leases; nil: as the room is
	round    bool                                     // limits are kept in units, as in the real one
}

func newFakeLedger(path string) *fakeLedger {
	return &fakeLedger{path: path, rung: make(chan struct{}), limits: map[string]Limit{}, took: map[Command]time.Duration{}, refused: map[int]time.Duration{}, hostRoom: NoLimit}
}

func (l *fakeLedger) Path() string { return l.path }

// ring tells those who wait. Held: mu.
func (l *fakeLedger) ring() {
	l.bell++
	close(l.rung)
	l.rung = make(chan struct{})
}

func charge(s Slot) uint64 {
	if s.Leased {
		return max(s.Lease, s.Fixed+s.Claim)
	}
	return s.Fixed + s.Claim
}

// room is what may still be charged to a group, whose own limit is the one given unless one was set. Held: mu.
func (l *fakeLedger) room(group string, limit uint64) uint64 {
	var sum, all uint64
	for _, s := range l.slots {
		all += s.Charge
		if s.Group == group {
			sum += s.Charge
		}
	}
	if set := l.limits[group]; set.Revision > 0 {
		limit = set.Bytes
	}
	room := limit - min(limit, sum)
	if set := l.limits[""]; set.Revision > 0 {
		room = min(room, set.Bytes-min(set.Bytes, all))
	}
	return room
}

func (l *fakeLedger) Lease(group, name string, size, fixed, limit uint64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return noSlot, l.fail
	}
	if len(l.leases) > 0 {
		err := l.leases[0]
		l.leases = l.leases[1:]
		if err != nil {
			return noSlot, err
		}
	}
	if room := l.room(group, limit); size > room {
		return noSlot, &LibraryError{Code: -3, Name: "KVCACHED_E_LIMIT", Text: "no room", Detail: fmt.Sprintf("%d > %d", size, room)}
	}
	index := 0
	for slices.ContainsFunc(l.slots, func(s Slot) bool { return s.Index == index }) {
		index++
	}
	l.slots = append(l.slots, Slot{Index: index, Name: name, Group: group, Lease: size, Fixed: fixed, Charge: size, Leased: true, Limit: limit})
	l.ring()
	return index, nil
}

func (l *fakeLedger) Unlease(slot int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return l.fail
	}
	i := slices.IndexFunc(l.slots, func(s Slot) bool { return s.Index == slot })
	if i < 0 {
		return &LibraryError{Code: -8, Name: "KVCACHED_E_SLOT", Text: "not leased"}
	}
	group := l.slots[i].Group
	l.slots = slices.Delete(l.slots, i, i+1)
	if !slices.ContainsFunc(l.slots, func(s Slot) bool { return s.Group == group }) {
		delete(l.limits, group) // it lives with the group's slots
	}
	l.ring()
	return nil
}

func (l *fakeLedger) Slots() ([]Slot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return nil, l.fail
	}
	return slices.Clone(l.slots), nil
}

func (l *fakeLedger) Wait(seen uint32, timeout time.Duration) (uint32, error) {
	l.mu.Lock()
	bell, rung, fail := l.bell, l.rung, l.fail
	l.mu.Unlock()
	if fail != nil || bell != seen {
		return bell, fail
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-rung:
	case <-timer.C:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bell, nil
}

func (l *fakeLedger) SetLimit(group string, bytes uint64) (Limit, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.round && bytes != NoLimit {
		bytes &^= 4095
	}
	l.limits[group] = Limit{Revision: l.limits[group].Revision + 1, Bytes: bytes}
	l.ring()
	return l.limits[group], l.fail
}

func (l *fakeLedger) Limit(group string) (Limit, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.limits[group], l.fail
}

func (l *fakeLedger) Command(slot int, command Command, wait time.Duration) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.at(slot)
	if s == nil || !s.Controlled {
		return 0, ErrSlot
	}
	name := s.Name
	l.commands = append(l.commands, command.String()+" "+name)
	answer := l.answer
	if d := l.took[command]; d > 0 || answer != nil {
		l.mu.Unlock()
		time.Sleep(min(d, wait))
		var err error
		if answer != nil {
			err = answer(name, command)
		}
		l.mu.Lock()
		if d > wait {
			return 0, ErrTimeout
		}
		if err != nil {
			return 0, err
		}
		if s = l.at(slot); s == nil {
			return 0, ErrSlot
		}
	}
	before := s.Charge
	switch command {
	case CommandTrim:
		s.Claim -= s.Idle + s.Pooled
		s.Idle, s.Pooled = 0, 0
	case CommandSleep:
		if s.Inside > 0 {
			return 0, ErrBusy
		}
		used := uint64(0)
		for _, other := range l.slots {
			used += other.HostBytes
		}
		if used+s.Claim > l.hostRoom {
			return 0, ErrHostLimit
		}
		s.Asleep, s.HostBytes, s.Claim, s.Lease = s.Asleep+s.Claim, s.HostBytes+s.Claim, 0, 0
		s.Idle, s.Pooled, s.KV, s.Weights = 0, 0, 0, 0
	case CommandWake:
		if s.Asleep > l.room(s.Group, s.Limit) {
			return 0, ErrLimit
		}
		if s.Asleep > 0 {
			s.Woke = monotonic()
		}
		s.Claim, s.Asleep, s.HostBytes = s.Claim+s.Asleep, 0, 0
	case CommandRefuse:
		l.refused[slot] = s.WantsSince
	}
	s.Charge = charge(*s)
	l.ring()
	return before - min(before, s.Charge), nil
}

// at finds a slot. Held: mu.
func (l *fakeLedger) at(index int) *Slot {
	i := slices.IndexFunc(l.slots, func(s Slot) bool { return s.Index == index })
	if i < 0 {
		return nil
	}
	return &l.slots[i]
}

// set changes a slot as its child would.
func (l *fakeLedger) set(index int, change func(*Slot)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.at(index); s != nil {
		change(s)
		l.ring()
	}
}

// grow has the child in a slot claim bytes more: it parks where there is no room, as the library does, and goes on when
// there is some, or fails when it is refused. A child that was put to sleep meanwhile goes on once it is awake.
func (l *fakeLedger) grow(index int, bytes uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		s := l.at(index)
		if s == nil {
			return ErrSlot
		}
		left := s.Charge - min(s.Charge, s.Fixed+s.Claim) // of its lease
		room := l.room(s.Group, s.Limit) + left
		if s.Asleep == 0 && bytes <= room {
			s.Claim += bytes
			s.Charge = charge(*s)
			s.Wants, s.WantsSince, s.Parked = 0, 0, 0
			l.ring()
			return nil
		}
		if l.refused[index] != 0 && l.refused[index] == s.WantsSince {
			s.Wants, s.WantsSince, s.Parked = 0, 0, 0
			l.ring()
			return ErrLimit
		}
		s.Wants = s.Asleep + bytes - min(bytes, left)
		if s.Parked == 0 {
			s.Parked, s.WantsSince = 1, monotonic()
			l.ring()
		}
		rung := l.rung
		l.mu.Unlock()
		<-rung
		l.mu.Lock()
	}
}

// breakWith has every call fail from now on; nil mends it.
func (l *fakeLedger) breakWith(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail = err
	l.ring()
}

// add puts in a slot of somebody else.
func (l *fakeLedger) add(s Slot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots = append(l.slots, s)
}

func fakeManager(t *testing.T, limit uint64) (*Manager, *fakeLedger) {
	t.Helper()
	return fakeManagerWith(t, Settings{Enabled: true, Limit: limit, Source: MemoryVariable})
}

func fakeManagerWith(t *testing.T, settings Settings) (*Manager, *fakeLedger) {
	t.Helper()
	ledger := newFakeLedger("/dev/shm/fake")
	manager, err := Open(settings, &fakeLibrary{ledger: ledger}, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFake(manager, ledger) })
	return manager, ledger
}

// closeFake closes the manager without waiting for the ledger's next second.
func closeFake(manager *Manager, ledgers ...*fakeLedger) {
	done := make(chan struct{})
	go func() { manager.Close(); close(done) }()
	for {
		for _, l := range ledgers {
			l.mu.Lock()
			l.ring()
			l.mu.Unlock()
		}
		select {
		case <-done:
			return
		case <-time.After(time.Millisecond):
		}
	}
}
