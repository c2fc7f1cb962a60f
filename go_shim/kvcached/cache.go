package kvcached

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Variables that a server sets for its child, read by the library's glue in llama-server. They are internal: the user's
// settings are LoadSettings'.
const (
	LeasesVariable   = "KVCACHED_LEASES" // device,slot,limit,ledger for each device, joined by ;
	GroupVariable    = "KVCACHED_GROUP"
	SleepsVariable   = "KVCACHED_SLEEPS"       // 1: the child will be put to sleep and prepares for it
	RoomWaitVariable = "KVCACHED_ROOM_WAIT_MS" // how long a claim may wait for this server to make room

	// One lease alone, for a child that does not know LeasesVariable.
	SlotVariable  = "KVCACHED_SLOT"
	LimitVariable = "KVCACHED_LIMIT"
)

const noSlot = -1

// part is what a model has on one device: a lease, and the slot that its child opens.
type part struct {
	cache *KVCache
	pool  *pool
	slot  int
	limit uint64
	main  bool // sleeps and wakes with the model; host memory beside a GPU does not
	seen  Slot // at the last look
	there bool // the slot was alive then

	tried    uint64        // spare bytes that a trim was tried on
	stuck    time.Duration // since when nothing is left that could help its claim
	fits     time.Duration // since when its claim has room under the limit and waits all the same
	told     time.Duration // WantsSince of the claim that was logged
	refused  time.Duration // WantsSince of the claim that was told to fail
	draining bool          // new requests wait: somebody at the head of the queue needs this model's memory
}

// KVCache is the budget of one child process: a lease on a slot of each device's ledger, which the child's first pages
// consume. The memory is the child's to map; none is allocated here. From Begin to End a request holds the model.
type KVCache struct {
	manager *Manager
	model   string
	name    string
	need    Need
	shares  []share
	whole   bool

	leases sync.Mutex // one Allocate or Free at a time; taken before Manager.mu

	// Protected by Manager.mu.
	parts     []*part
	pinned    bool
	refs      int           // requests between Begin and End
	waiting   int           // of them, those in Awake
	used      bool          // a request held it: it is loaded
	began     time.Duration // when it came to be in use
	idleSince time.Duration
	slept     time.Duration // when it was seen asleep first; 0: awake
	woke      time.Duration
	sleeping  time.Duration // when a command to sleep was sent that has not come back; 0: none
	trimming  bool
	unloading time.Duration // when the scheduler was asked to unload it
	retry     time.Duration // no command to sleep before
	failed    int           // commands to sleep that failed since the last that did not, but for use
	hostShort bool          // its sleep found no host memory
	again     time.Duration // the scheduler is not to be asked before
	epoch     int           // of the child: what is answered about an earlier one is of no interest
	lost      bool          // it sleeps, and there is no room for it with what its claim lacks, nor without
	left      bool          // it sleeps with a claim parked, whose request has gone: nobody needs it
	timerUp   bool          // it is to sleep as soon as nobody uses it
	wake      *demand
}

// share is what a model is to have on one device.
type share struct {
	pool *pool
	need Need
	main bool
	size uint64 // of the lease
}

// Allocate takes leases of size bytes together, before the child is started; of these the need's Fixed counts as held
// outside the library: the child's claims come on top of it, and use up the rest. Over the limit it returns a *LimitError,
// and other failures of the ledger as they are; the child must then not be started. It does not wait for room: see
// Manager.Admit. A cache that holds a lease has to be freed first.
func (c *KVCache) Allocate(size int) error {
	if size <= 0 {
		return fmt.Errorf("kvcached: a lease of %d bytes for model %s: it must be positive", size, c.name)
	}
	c.leases.Lock()
	defer c.leases.Unlock()
	m := c.manager
	m.mu.Lock()
	held := len(c.parts) > 0
	m.mu.Unlock()
	if held {
		return fmt.Errorf("kvcached: model %s already holds its lease", c.name)
	}

	var parts []*part
	sizes := c.split(uint64(size))
	for i, bytes := range sizes {
		s := c.shares[i]
		m.mu.Lock()
		limit := s.pool.limit
		m.mu.Unlock()
		slot, err := s.pool.ledger.Lease(m.group, c.name, bytes, min(s.need.Fixed(), bytes), limit)
		if err != nil {
			dropLeases(parts)
			return c.refused(s, bytes, err)
		}
		parts = append(parts, &part{
			cache: c, pool: s.pool, slot: slot, limit: limit, main: s.main, there: true,
			seen: Slot{Index: slot, Name: c.name, Group: m.group, Lease: bytes, Charge: bytes, Leased: true},
		})
		s.pool.announce(limit)
		if err := s.pool.cover(context.Background()); errors.Is(err, ErrLimit) {
			dropLeases(parts)
			return c.refused(s, bytes, err)
		} else if err != nil {
			s.pool.uncovered(err) // the service's own trouble is none of this server's models
		}
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	c.reset()
	c.parts = parts
	for i, bytes := range sizes {
		c.shares[i].size = bytes
	}
	m.caches[c] = struct{}{}
	for _, part := range parts {
		part.pool.parts = append(part.pool.parts, part)
	}
	return nil
}

// refused is the error for a lease that could not be had.
func (c *KVCache) refused(s share, bytes uint64, err error) error {
	if !errors.Is(err, ErrLimit) {
		return fmt.Errorf("kvcached: no lease for model %s: %w", c.name, err)
	}
	v, lookErr := s.pool.look()
	if lookErr != nil {
		return errors.Join(err, lookErr)
	}
	defer c.manager.mu.Unlock()
	need := s.need
	need.FirstStep = bytes - min(bytes, need.Total()-need.FirstStep)
	return s.pool.refusal(c.name, need, v)
}

// split divides a lease among the devices as their shares are to each other.
func (c *KVCache) split(size uint64) []uint64 {
	var whole uint64
	for _, s := range c.shares {
		whole += s.size
	}
	sizes := make([]uint64, len(c.shares))
	left := size
	for i, s := range c.shares {
		switch {
		case whole == size:
			sizes[i] = s.size
		case i == len(sizes)-1 || whole == 0:
			sizes[i] = left
		default:
			sizes[i] = min(left, uint64(float64(size)*(float64(s.size)/float64(whole))))
		}
		left -= sizes[i]
	}
	return sizes
}

func dropLeases(parts []*part) {
	for _, part := range parts {
		if err := part.pool.ledger.Unlease(part.slot); err != nil {
			slog.Warn("kvcached: a lease could not be returned; the slot ends with this server", "model", part.cache.name,
				"device", part.pool.device.ID, "slot", part.slot, "error", err)
		}
	}
}

// Free drops the leases; what a child that still runs has mapped stays charged until it ends. Requests that wait for the
// model to wake are told. A cache may be freed twice, and take a new lease after it.
func (c *KVCache) Free() {
	c.leases.Lock()
	defer c.leases.Unlock()
	m := c.manager
	// Forget the slots first: once they are free, another cache may be given them.
	m.mu.Lock()
	parts := c.parts
	c.parts = nil
	delete(m.caches, c)
	for _, part := range parts {
		part.pool.remove(part)
	}
	if c.wake != nil {
		c.wake.finish(&EndedError{Model: c.name})
	}
	c.reset()
	// A sleeper's end is host memory for others.
	for other := range m.caches {
		other.hostShort = false
	}
	m.mu.Unlock()
	dropLeases(parts)
	m.kick()
}

// reset forgets the child that the cache was for; requests that hold the model still end. Held: mu.
func (c *KVCache) reset() {
	now := c.manager.library.Monotonic()
	c.epoch++
	c.used, c.began, c.idleSince = c.refs > 0, now, now
	c.slept, c.woke, c.sleeping, c.unloading, c.retry, c.again = 0, 0, 0, 0, 0, 0
	c.failed = 0
	c.trimming, c.hostShort, c.timerUp, c.lost, c.left = false, false, false, false, false
}

// Slot is the slot leased on the first device, or -1.
func (c *KVCache) Slot() int {
	c.manager.mu.Lock()
	defer c.manager.mu.Unlock()
	if len(c.parts) == 0 {
		return noSlot
	}
	return c.parts[0].slot
}

// Whole says whether the leases cover the whole need on every device: such a model needs no margin beside it when its
// layers are divided. Where it does not, the rest is to go elsewhere.
func (c *KVCache) Whole() bool {
	c.manager.mu.Lock()
	defer c.manager.mu.Unlock()
	for _, s := range c.shares {
		if s.main && s.size < s.need.Total() {
			return false
		}
	}
	return len(c.parts) > 0
}

// Need is what the cache was made for.
func (c *KVCache) Need() Need { return c.need }

// Model is the file of the model.
func (c *KVCache) Model() string { return c.model }

// Env is what the child needs to find its slots. It is empty while there is no lease.
func (c *KVCache) Env() map[string]string {
	m := c.manager
	m.mu.Lock()
	defer m.mu.Unlock()
	env := map[string]string{}
	if len(c.parts) == 0 {
		return env
	}
	entries := make([]string, 0, len(c.parts))
	for _, part := range c.parts {
		limit := strconv.FormatUint(part.limit, 10)
		entries = append(entries, strings.Join([]string{part.pool.device.ID, strconv.Itoa(part.slot), limit, part.pool.ledger.Path()}, ","))
		if part.pool == m.host && len(c.parts) == 1 {
			env[LedgerVariable] = part.pool.ledger.Path()
			env[SlotVariable] = strconv.Itoa(part.slot)
			env[LimitVariable] = limit
		}
	}
	env[EnabledVariable] = "true"
	env[LeasesVariable] = strings.Join(entries, ";")
	env[GroupVariable] = m.group
	env[SleepsVariable] = "1"
	env[RoomWaitVariable] = strconv.FormatInt(min(m.roomWait.Milliseconds(), math.MaxUint32), 10) // the child's number has 32 bits
	if m.settings.HostText != "" {
		env[HostMemoryVariable] = m.settings.HostText
	}
	return env
}

// EndedError says that a model's process ended, or was unloaded, while a request waited for it. Another try loads it anew.
type EndedError struct{ Model string }

func (e *EndedError) Error() string {
	return fmt.Sprintf("kvcached: model %s was unloaded while the request waited for it; send the request again", e.Model)
}
