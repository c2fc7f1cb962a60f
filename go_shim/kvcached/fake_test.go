package kvcached

import (
	"fmt"
	"slices"
	"sync"
	"testing"
)

// fakeLibrary keeps a ledger in memory, with the rules of the real one for what this package relies on.
type fakeLibrary struct {
	ledger *fakeLedger
	path   string
	fail   error
}

func (l *fakeLibrary) Version() string { return "fake" }

func (l *fakeLibrary) OpenLedger(path string) (Ledger, error) {
	if l.fail != nil {
		return nil, l.fail
	}
	l.path = path
	return l.ledger, nil
}

type fakeLedger struct {
	mu    sync.Mutex
	slots []Slot
	fail  error
}

func (l *fakeLedger) Path() string { return "/dev/shm/fake" }

func (l *fakeLedger) Lease(group, name string, size, fixed, limit uint64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return noSlot, l.fail
	}
	var sum uint64
	for _, slot := range l.slots {
		if slot.Group == group {
			sum += slot.Charge
		}
	}
	if sum > limit || size > limit-sum {
		return noSlot, &LibraryError{Code: -3, Name: "KVCACHED_E_LIMIT", Text: "no room", Detail: fmt.Sprintf("%d + %d > %d", sum, size, limit)}
	}
	index := 0
	for slices.ContainsFunc(l.slots, func(s Slot) bool { return s.Index == index }) {
		index++
	}
	l.slots = append(l.slots, Slot{Index: index, Name: name, Group: group, Lease: size, Fixed: fixed, Charge: size, Leased: true})
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
	l.slots = slices.Delete(l.slots, i, i+1)
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

// set changes a slot as its child would.
func (l *fakeLedger) set(index int, change func(*Slot)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.slots {
		if l.slots[i].Index == index {
			change(&l.slots[i])
		}
	}
}

func fakeManager(t *testing.T, limit uint64) (*Manager, *fakeLedger) {
	t.Helper()
	ledger := &fakeLedger{}
	manager, err := Open(Settings{Enabled: true, Limit: limit, Source: MemoryVariable}, &fakeLibrary{ledger: ledger}, "")
	if err != nil {
		t.Fatal(err)
	}
	return manager, ledger
}
