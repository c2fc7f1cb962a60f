package kvcached

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"
)

var errClosed = errors.New("kvcached: the server is shutting down")

// wakeWait is how long a child may take to wake. It is past any copy over a bus: a child that takes longer hangs.
const wakeWait = time.Minute

// wakeTries is how often a child is told to wake that does not answer.
const wakeTries = 3

// demand is somebody in the queue for room: a model that is to wake, or to be admitted. Queues are in order of arrival, on
// every device the same, so that two demands never wait for each other. Protected by Manager.mu.
type demand struct {
	cache  *KVCache
	wake   bool
	turn   bool // the child's own claim waits: it was put to sleep so that another could go on
	bare   bool // and cannot be had: the child wakes without
	since  time.Duration
	serial uint64
	pools  []*pool

	need    map[*pool]uint64 // of an admission
	granted map[*pool]bool   // there is room for it there now
	running bool             // leases are being taken, or commands carried out
	waiters int              // requests in Awake
	tries   int
	after   time.Duration // not to be tried before
	short   bool          // the device itself had no room, whatever the limit says
	stuck   time.Duration // since when nothing is left that could help
	told    bool          // that it waits was logged
	charged uint64        // when there was room, for the log; and the limit then
	limit   uint64

	ready chan struct{} // admission: there is room everywhere; holds one
	done  chan struct{}
	over  bool
	err   error
}

func (m *Manager) newDemand(c *KVCache, pools []*pool, since time.Duration) *demand {
	m.serial++
	return &demand{
		cache: c, pools: pools, since: since, serial: m.serial,
		granted: map[*pool]bool{}, ready: make(chan struct{}, 1), done: make(chan struct{}),
	}
}

// before says who came first.
func (d *demand) before(other *demand) bool {
	return d.since < other.since || d.since == other.since && d.serial < other.serial
}

// enqueue puts a demand into the queues of its devices, at its place. Held: Manager.mu.
func (d *demand) enqueue() {
	for _, p := range d.pools {
		i := slices.IndexFunc(p.queue, func(other *demand) bool { return d.before(other) })
		if i < 0 {
			i = len(p.queue)
		}
		p.queue = slices.Insert(p.queue, i, d)
		p.kick()
	}
}

// dequeue takes it out again. Held: Manager.mu.
func (d *demand) dequeue() {
	for _, p := range d.pools {
		p.queue = slices.DeleteFunc(p.queue, func(other *demand) bool { return other == d })
		if p.waking == d {
			p.waking = nil
		}
		p.kick()
	}
}

// finish ends a demand, for all who wait on it. Held: Manager.mu.
func (d *demand) finish(err error) {
	if d.over {
		return
	}
	d.over, d.err = true, err
	d.dequeue()
	if c := d.cache; d.wake {
		// From here on the requests count as in flight, before each of them has noticed.
		c.waiting -= d.waiters
		if c.wake == d {
			c.wake = nil
		}
		if err == nil && d.waiters > 0 {
			c.began = d.since
		}
	}
	close(d.done)
}

// Begin says that a request holds the model, until its End. Neither blocks.
func (c *KVCache) Begin() {
	m := c.manager
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.refs == 0 {
		c.began = m.library.Monotonic()
	}
	c.refs++
	if !c.used {
		for _, p := range m.pools {
			p.kick() // the next may load
		}
	}
	c.used, c.timerUp, c.left = true, false, false
}

// End says that a request is through with the model.
func (c *KVCache) End() {
	m := c.manager
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.refs == 0 {
		slog.Error("kvcached: a request ended that had not begun", "model", c.name)
		return
	}
	c.refs--
	if c.inFlight() > 0 {
		return
	}
	c.idleSince = m.library.Monotonic()
	if d := c.wake; d != nil && d.waiters == 0 && !d.running {
		d.finish(nil) // whose claim it was has gone
		c.left = d.turn
	}
	for _, part := range c.parts {
		part.pool.kick()
	}
}

// inFlight is how many requests were handed the model. Held: Manager.mu.
func (c *KVCache) inFlight() int { return c.refs - c.waiting }

// Sleep puts the model to sleep as soon as no request holds it; a request before that cancels it. It does not wait.
func (c *KVCache) Sleep() {
	m := c.manager
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.refs > 0 {
		return
	}
	c.timerUp = true
	for _, part := range c.parts {
		part.pool.kick()
	}
}

// SetPinned says whether the model may be unloaded: one with keep_alive -1 may sleep, no more.
func (c *KVCache) SetPinned(pinned bool) {
	c.manager.mu.Lock()
	defer c.manager.mu.Unlock()
	c.pinned = pinned
}

// Awake returns when the model is awake, in turn with other models of the same devices, or with the reason that it cannot
// be. The request that asks must hold the model (Begin); from then on the model is nobody's victim.
func (c *KVCache) Awake(ctx context.Context) error {
	m := c.manager
	pools := c.mainPools()
	views, err := m.look(pools)
	if err != nil {
		return err
	}
	if len(c.parts) == 0 || m.over {
		defer m.mu.Unlock()
		if m.over {
			return errClosed
		}
		return &EndedError{Model: c.name}
	}
	d := c.wake
	if d == nil {
		if c.sleeping == 0 && !c.asleep() && !c.draining() {
			m.mu.Unlock()
			return nil
		}
		d = m.newDemand(c, pools, views[0].now)
		d.wake, c.wake = true, d
		d.enqueue()
	}
	d.waiters++
	c.waiting++
	m.mu.Unlock()

	select {
	case <-d.done:
		return d.err
	case <-ctx.Done():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if d.over {
		return ctx.Err()
	}
	d.waiters--
	c.waiting--
	if d.waiters == 0 && !d.turn && !d.running {
		d.finish(nil)
	}
	return ctx.Err()
}

// runWake tells a child to wake, on all of its devices at once. Not held: Manager.mu.
func (m *Manager) runWake(d *demand, parts []*part, bytes uint64) {
	c := d.cache
	start := m.library.Monotonic()
	_, errs := command(parts, CommandWake, wakeWait)

	m.mu.Lock()
	defer m.mu.Unlock()
	m.commands++
	now := m.library.Monotonic()
	d.running = false
	clear(d.granted)
	for _, p := range d.pools {
		if p.waking == d {
			p.waking = nil
		}
		p.kick()
	}
	if d.over {
		return
	}
	err := errors.Join(errs...)
	switch {
	case err == nil:
		c.woke, c.slept = now, 0
		d.finish(nil)
		slog.Info("kvcached: woke", "model", c.name, "need", FormatSize(bytes), "charged", FormatSize(d.charged), "limit", sizeOrNone(d.limit), "waited", start-d.since, "took", now-start)
	case errors.Is(err, ErrSlot):
		d.finish(&EndedError{Model: c.name})
	case errors.Is(err, ErrLimit), errors.Is(err, ErrShort), errors.Is(err, ErrBusy):
		// Somebody else was faster, or the device is fuller than the ledger knows.
		d.tries++
		d.short = errors.Is(err, ErrShort) || d.tries > wakeTries
		d.after = now + 100*time.Millisecond
		slog.Info("kvcached: no room to wake yet", "model", c.name, "need", FormatSize(bytes), "took", now-start, "error", err)
	case errors.Is(err, ErrTimeout) && d.tries < wakeTries:
		// It may hang: the others need not wait for it.
		d.tries++
		d.dequeue()
		d.since = now
		d.enqueue()
		slog.Warn("kvcached: a model did not wake in time", "model", c.name, "took", now-start, "error", err)
	default:
		slog.Warn("kvcached: a model cannot be woken", "model", c.name, "took", now-start, "error", err)
		d.finish(&WakeError{Model: c.name, Err: err})
	}
}

// WakeError says that a sleeping model could not be woken.
type WakeError struct {
	Model string
	Err   error
}

func (e *WakeError) Error() string {
	return "kvcached: model " + e.Model + " sleeps and could not be woken: " + e.Err.Error()
}

func (e *WakeError) Unwrap() error { return e.Err }

// command has the processes of several slots do something at once, and waits for all of them.
func command(parts []*part, what Command, wait time.Duration) (freed uint64, errs []error) {
	type answer struct {
		freed uint64
		err   error
	}
	answers := make(chan answer, len(parts))
	for _, part := range parts {
		ledger, slot := part.pool.ledger, part.slot
		go func() {
			bytes, err := ledger.Command(slot, what, wait)
			answers <- answer{bytes, err}
		}()
	}
	for range parts {
		a := <-answers
		freed += a.freed
		if a.err != nil {
			errs = append(errs, a.err)
		}
	}
	return freed, errs
}
