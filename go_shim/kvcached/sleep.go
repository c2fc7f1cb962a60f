package kvcached

import (
	"errors"
	"log/slog"
	"time"
)

const (
	// sleepWait is how long a child may take to sleep: its first sleep copies all weights, into memory that is not pinned yet.
	sleepWait = 2 * time.Minute
	trimWait  = 10 * time.Second
	// unloadWait is how long an unload may take until the scheduler is asked again.
	unloadWait = 10 * time.Second
)

// observe notes what the last look says about the whole model. Held: Manager.mu.
func (c *KVCache) observe(now time.Duration) {
	switch {
	case !c.asleep():
		c.slept, c.lost, c.left = 0, false, false
	case c.slept == 0:
		c.slept = now
	}
	if c.slept > 0 && c.sleeping == 0 && c.wake == nil && !c.lost && c.parked() {
		c.takeTurn() // whoever put it to sleep: its child waits to be woken
	}
}

// on is the model's part on a device where it sleeps and wakes, nil for none.
func (c *KVCache) on(p *pool) *part {
	for _, part := range c.parts {
		if part.pool == p && part.main {
			return part
		}
	}
	return nil
}

// any says whether something holds for one of the parts that sleep and wake. Held: Manager.mu.
func (c *KVCache) any(holds func(*part) bool) bool {
	for _, part := range c.parts {
		if part.main && holds(part) {
			return true
		}
	}
	return false
}

func (c *KVCache) asleep() bool {
	return c.any(func(p *part) bool { return p.there && p.seen.Attached && p.seen.Asleep > 0 })
}

func (c *KVCache) parked() bool {
	return c.any(func(p *part) bool { return p.there && (p.seen.Parked > 0 || p.seen.Wants > 0) })
}

func (c *KVCache) draining() bool { return c.any(func(p *part) bool { return p.draining }) }

// loads says whether a model was admitted, or is about to be, that no request has held yet. Held: mu.
func (m *Manager) loads() bool {
	for c := range m.caches {
		if !c.used {
			return true
		}
	}
	for _, p := range m.pools {
		for _, d := range p.queue {
			if !d.wake && d.running {
				return true
			}
		}
	}
	return false
}

// inUse says whether the model must not be disturbed: it loads, a request has it, or its child says that it works.
func (c *KVCache) inUse() bool {
	return !c.used || c.inFlight() > 0 || c.any(func(p *part) bool {
		return !p.there || !p.seen.Attached || p.seen.Inside > 0 || p.seen.Queued > 0 || p.seen.Parked > 0 || p.seen.Wants > 0
	})
}

// mayUnload says whether the scheduler may be asked to unload the model.
func (c *KVCache) mayUnload() bool {
	return c.refs == 0 && !c.pinned && c.unloading == 0 && c.wake == nil && c.used && c.manager.unloader != nil &&
		c.again <= c.manager.library.Monotonic()
}

// CanSleep says whether the model would go to sleep if it were told to: its child has opened its slot, and answers commands.
func (c *KVCache) CanSleep() bool {
	c.manager.mu.Lock()
	defer c.manager.mu.Unlock()
	return c.any(func(p *part) bool { return p.there && p.seen.Attached && p.seen.Controlled })
}

// lastWoke is when the model woke last, by whomever; 0 for never.
func (c *KVCache) lastWoke() time.Duration {
	last := c.woke
	for _, part := range c.parts {
		if part.main && part.there {
			last = max(last, part.seen.Woke)
		}
	}
	return last
}

// claims says whether a claim of the child waits for room and may still have it.
func (p *part) claims() bool {
	return p.there && p.seen.Wants > 0 && p.refused != p.seen.WantsSince
}

// frees is what the model's sleep gives back on this device: all but what it holds outside the library. Its lease ends too.
func (p *part) frees() uint64 {
	if !p.there {
		return 0
	}
	return p.seen.Charge - min(p.seen.Charge, p.seen.Fixed)
}

// spare is what a trim gives back: not what the lease covers.
func (p *part) spare() uint64 {
	if !p.there {
		return 0
	}
	kept := p.seen.Fixed + p.seen.Claim - min(p.seen.Claim, p.seen.Idle+p.seen.Pooled)
	if p.seen.Leased {
		kept = max(kept, p.seen.Lease)
	}
	return p.seen.Charge - min(p.seen.Charge, kept)
}

func (p *part) victim() Victim {
	return Victim{Model: p.cache.model, Name: p.cache.name, LastUse: p.cache.idleSince, Frees: p.frees()}
}

// timers puts models to sleep whose time has come, and has sleepers unloaded after theirs. Each model is seen to by its
// first device. The result is when the next is due. Held: Manager.mu.
func (p *pool) timers(v view) time.Duration {
	next := pollEvery
	m := p.manager
	due := func(at time.Duration) bool {
		if at > v.now {
			next = min(next, at-v.now)
		}
		return at <= v.now
	}
	for _, part := range p.parts {
		c := part.cache
		switch {
		case c.parts[0] != part || c.sleeping != 0:
		case c.unloading != 0:
			if due(c.unloading + unloadWait) {
				c.unloading = 0
			}
		case c.asleep():
			if c.mayUnload() && due(c.slept+m.tuning.asleep) {
				m.unload(c, "it slept long enough")
			}
		case c.refs > 0 || c.inUse():
		case c.timerUp && !part.seen.Controlled:
			if c.mayUnload() {
				m.unload(c, "its keep-alive is over and it cannot sleep")
			}
		case c.timerUp || m.tuning.idle > 0 && due(c.idleSince+m.tuning.idle):
			woke := c.lastWoke()
			if part.frees() > 0 && part.seen.Controlled && !c.hostShort && due(c.retry) && (woke == 0 || due(woke+awakeAtLeast)) {
				m.sleep(c, "idle", 0, v)
			}
		}
	}
	return next
}

// sleep puts a model to sleep, on all of its devices. Held: Manager.mu.
func (m *Manager) sleep(c *KVCache, why string, need int64, v view) {
	if c.sleeping != 0 {
		return
	}
	c.sleeping = v.now
	var parts []*part
	for _, part := range c.parts {
		if part.main {
			parts = append(parts, part)
		}
	}
	epoch := c.epoch
	m.spawn(func() {
		freed, errs := command(parts, CommandSleep, sleepWait)
		m.mu.Lock()
		defer m.mu.Unlock()
		m.commands++
		for _, part := range parts {
			part.pool.kick()
		}
		if c.epoch == epoch {
			c.sleepEnded(why, need, v, freed, errors.Join(errs...))
		}
	})
}

// sleepEnded takes over the answer to a command to sleep.
func (c *KVCache) sleepEnded(why string, need int64, v view, freed uint64, err error) {
	m := c.manager
	now := m.library.Monotonic()
	took := now - c.sleeping
	c.sleeping = 0
	log := []any{
		"model", c.name, "reason", why, "need", FormatSize(uint64(need)), "charged", FormatSize(v.charge), "limit", sizeOrNone(v.limit),
		"freed", FormatSize(freed), "took", took,
	}
	switch {
	case err == nil:
		c.slept, c.timerUp, c.failed = now, false, 0
		for _, part := range c.parts {
			part.draining = false
		}
		slog.Info("kvcached: put to sleep", log...)
		c.takeTurn()
	case errors.Is(err, ErrHostLimit), errors.Is(err, ErrShort):
		slog.Info("kvcached: no host memory for a model to sleep", append(log, "error", err)...)
		c.hostShort = true
		m.makeHostRoom(c, now)
	case errors.Is(err, ErrBusy):
		c.retry = now + 250*time.Millisecond
		slog.Info("kvcached: not put to sleep, it came to be in use", log...)
	default:
		c.retry, c.failed = now+10*time.Second, c.failed+1
		slog.Warn("kvcached: a model cannot be put to sleep", append(log, "error", err)...)
	}
}

// takeTurn puts a sleeper into the queue whose own requests are under way: it was put to sleep so that another could go on.
func (c *KVCache) takeTurn() {
	if c.inFlight() <= 0 {
		return
	}
	d := c.wake
	if d == nil {
		d = c.manager.newDemand(c, c.mainPools(), c.began)
		d.wake, c.wake = true, d
	} else {
		d.dequeue() // requests that came later wait for it already
		d.since = min(d.since, c.began)
	}
	d.turn = true
	d.enqueue()
}

// makeHostRoom makes host memory for a model that is to sleep: the oldest sleeper is unloaded, or, without one, the idle
// model itself. Held: Manager.mu.
func (m *Manager) makeHostRoom(c *KVCache, now time.Duration) {
	var oldest *KVCache
	for other := range m.caches {
		if other == c || !other.asleep() {
			continue
		}
		if other.unloading != 0 {
			return // wait for that one
		}
		held := other.any(func(p *part) bool { return p.seen.HostBytes > 0 })
		if held && other.mayUnload() && (oldest == nil || other.slept < oldest.slept) {
			oldest = other
		}
	}
	switch {
	case oldest != nil:
		m.unload(oldest, "host memory is short")
	case c.mayUnload():
		m.unload(c, "host memory is short")
	default:
		c.hostShort = false
		c.retry, c.failed = now+10*time.Second, c.failed+1
	}
}

// trim has a model give back what holds nothing. Held: Manager.mu.
func (m *Manager) trim(p *part, need int64) {
	c := p.cache
	c.trimming = true
	spare, epoch := p.spare(), c.epoch
	m.spawn(func() {
		start := m.library.Monotonic()
		freed, errs := command([]*part{p}, CommandTrim, trimWait)
		m.mu.Lock()
		defer m.mu.Unlock()
		m.commands++
		p.pool.kick()
		if c.epoch != epoch {
			return
		}
		c.trimming = false
		p.tried = spare // what it did not give, it would not give to a second command
		slog.Info("kvcached: trimmed", "model", c.name, "need", FormatSize(uint64(need)), "spare", FormatSize(spare), "freed", FormatSize(freed),
			"took", m.library.Monotonic()-start, "error", errors.Join(errs...))
	})
}

// unload asks the scheduler to unload a model. Held: Manager.mu.
func (m *Manager) unload(c *KVCache, why string) {
	if c.unloading != 0 {
		return
	}
	unloader := m.unloader
	now := m.library.Monotonic()
	c.unloading = now
	slept := time.Duration(0)
	if c.slept > 0 {
		slept = now - c.slept
	}
	m.spawn(func() {
		started := unloader(c.model)
		m.mu.Lock()
		defer m.mu.Unlock()
		slog.Info("kvcached: unload", "model", c.name, "reason", why, "asleep_for", slept, "started", started)
		if !started {
			c.unloading = 0
			c.again = m.library.Monotonic() + time.Second
			for other := range m.caches {
				other.hostShort = false
			}
		}
		for _, p := range m.pools {
			p.kick()
		}
	})
}

// refuse has a parked claim fail: nothing that this server decides about could help it. Held: Manager.mu.
func (m *Manager) refuse(p *part, v view) {
	p.refused = p.seen.WantsSince
	slog.Warn("kvcached: a claim is refused, nothing is left that could make room", "model", p.cache.name, "device", p.pool.device.ID,
		"need", FormatSize(p.seen.Wants), "charged", FormatSize(v.charge), "limit", sizeOrNone(v.limit))
	m.spawn(func() {
		if _, errs := command([]*part{p}, CommandRefuse, trimWait); len(errs) > 0 {
			slog.Warn("kvcached: a claim could not be refused", "model", p.cache.name, "error", errs[0])
		}
	})
}
