package kvcached

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
)

// Variables that a server sets for its child, read by the library's glue in llama-server. They are internal: the user's
// settings are LoadSettings'.
const (
	SlotVariable  = "KVCACHED_SLOT"
	GroupVariable = "KVCACHED_GROUP"
	LimitVariable = "KVCACHED_LIMIT"
)

const noSlot = -1

// KVCache is the budget of one child process: a lease on a slot of the ledger, which the child's first pages consume.
// The memory is the child's to map; none is allocated here.
type KVCache struct {
	manager *Manager
	model   string
	name    string
	need    Need

	mu   sync.Mutex
	slot int
}

// Allocate takes a lease of size bytes, to be called before the child is started; of these the need's Outside counts as held
// outside the library: the child's claims come on top of it, and use up the rest. Over the limit it returns a *LimitError, and other failures of the ledger as they are; the child
// must then not be started. A cache that holds a lease has to be freed first.
func (c *KVCache) Allocate(size int) error {
	if size <= 0 {
		return fmt.Errorf("kvcached: a lease of %d bytes for model %s: it must be positive", size, c.name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.slot != noSlot {
		return fmt.Errorf("kvcached: model %s already holds the lease of slot %d", c.name, c.slot)
	}

	m := c.manager
	slot, err := m.ledger.Lease(m.group, c.name, uint64(size), c.need.Outside, m.settings.Limit)
	if errors.Is(err, ErrLimit) {
		charges, listErr := m.charges()
		if listErr != nil {
			return errors.Join(err, listErr)
		}
		need := c.need
		need.FirstStep = uint64(size) - min(uint64(size), need.Weights)
		return m.refusal(c.name, need, charges)
	}
	if err != nil {
		return fmt.Errorf("kvcached: no lease for model %s: %w", c.name, err)
	}

	c.slot = slot
	m.mu.Lock()
	m.caches[slot] = c
	m.mu.Unlock()
	return nil
}

// Free drops the lease; what a child that still runs has mapped stays charged until it ends. A cache may be freed twice,
// and take a new lease after it.
func (c *KVCache) Free() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.slot == noSlot {
		return
	}
	m := c.manager
	// Forget the slot first: once it is free, another cache may be given it.
	m.mu.Lock()
	delete(m.caches, c.slot)
	m.mu.Unlock()
	if err := m.ledger.Unlease(c.slot); err != nil {
		slog.Warn("kvcached: a lease could not be returned; the slot ends with this server", "model", c.name, "slot", c.slot, "error", err)
	}
	c.slot = noSlot
}

// Slot is the slot leased, or -1.
func (c *KVCache) Slot() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.slot
}

// Env is what the child needs to find its slot. It is empty while there is no lease.
func (c *KVCache) Env() map[string]string {
	slot := c.Slot()
	if slot == noSlot {
		return map[string]string{}
	}
	m := c.manager
	return map[string]string{
		EnabledVariable: "true",
		LedgerVariable:  m.ledger.Path(),
		SlotVariable:    strconv.Itoa(slot),
		GroupVariable:   m.group,
		LimitVariable:   strconv.FormatUint(m.settings.Limit, 10),
	}
}
