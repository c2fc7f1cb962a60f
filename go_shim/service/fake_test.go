package service

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"kvpatch.dev/shim/kvcached"
)

// fakeLibrary and fakeLedger keep to the rules of the real ones as far as the service relies on them.
type fakeLibrary struct{ ledgers map[string]*fakeLedger }

func (l *fakeLibrary) Version() string                          { return "fake" }
func (l *fakeLibrary) Monotonic() time.Duration                 { return time.Hour }
func (l *fakeLibrary) LedgerPath(device string) (string, error) { return "/fake/" + device, nil }
func (l *fakeLibrary) OpenLedger(path string) (kvcached.Ledger, error) {
	if ledger := l.ledgers[path]; ledger != nil {
		return ledger, nil
	}
	return nil, fmt.Errorf("no ledger %s", path)
}

type fakeLedger struct {
	mu     sync.Mutex
	slots  []kvcached.Slot
	limit  kvcached.Limit
	next   int
	rung   uint32
	bell   chan struct{}     // closed at every ring
	before func(name string) // called by Lease, outside the lock
	fail   error             // of the next Lease
	stuck  error             // of every Unlease
}

func newFakeLedger() *fakeLedger {
	return &fakeLedger{limit: kvcached.Limit{Bytes: kvcached.NoLimit}, bell: make(chan struct{})}
}

func (l *fakeLedger) Path() string { return "/dev/null" }

// ring: held mu.
func (l *fakeLedger) ring() {
	l.rung++
	close(l.bell)
	l.bell = make(chan struct{})
}

func (l *fakeLedger) charge() (sum uint64) {
	for _, s := range l.slots {
		sum += s.Charge
	}
	return sum
}

func (l *fakeLedger) Lease(group, name string, size, fixed, limit uint64) (int, error) {
	if l.before != nil {
		l.before(name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.fail; err != nil {
		l.fail = nil
		return -1, err
	}
	if charge := l.charge(); l.limit.Bytes != kvcached.NoLimit && charge+size > l.limit.Bytes {
		return -1, &kvcached.LibraryError{Code: -3, Name: "KVCACHED_E_LIMIT", Text: "no room", Detail: fmt.Sprintf("%d of %d", charge, l.limit.Bytes)}
	}
	l.next++
	l.slots = append(l.slots, kvcached.Slot{Index: l.next, Name: name, Group: group, Lease: size, Fixed: fixed, Charge: size, Leased: true, Limit: limit})
	l.ring()
	return l.next, nil
}

func (l *fakeLedger) Unlease(slot int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stuck != nil {
		return l.stuck
	}
	i := slices.IndexFunc(l.slots, func(s kvcached.Slot) bool { return s.Index == slot })
	if i < 0 {
		return kvcached.ErrSlot
	}
	l.slots = slices.Delete(l.slots, i, i+1)
	l.ring()
	return nil
}

func (l *fakeLedger) Slots() ([]kvcached.Slot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.slots), nil
}

func (l *fakeLedger) Command(int, kvcached.Command, time.Duration) (uint64, error) {
	panic("the service gives no commands")
}

func (l *fakeLedger) Wait(seen uint32, timeout time.Duration) (uint32, error) {
	l.mu.Lock()
	now, bell := l.rung, l.bell
	l.mu.Unlock()
	if now == seen {
		select {
		case <-bell:
		case <-time.After(timeout):
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rung, nil
}

func (l *fakeLedger) SetLimit(group string, bytes uint64) (kvcached.Limit, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if group != "" && !slices.ContainsFunc(l.slots, func(s kvcached.Slot) bool { return s.Group == group }) {
		return kvcached.Limit{}, &kvcached.LibraryError{Code: -8, Name: "KVCACHED_E_SLOT", Text: "the group has no live slot"}
	}
	if group == "" {
		l.limit = kvcached.Limit{Revision: l.limit.Revision + 1, Bytes: bytes}
	}
	return l.read(), nil
}

func (l *fakeLedger) Limit(string) (kvcached.Limit, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.read(), nil
}

func (l *fakeLedger) read() kvcached.Limit {
	limit := l.limit
	limit.Charge = l.charge()
	if limit.Charge > limit.Bytes {
		limit.Overage = limit.Charge - limit.Bytes
	}
	return limit
}
