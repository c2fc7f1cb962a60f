package kvcached

import (
	"log/slog"
	"math"
	"slices"
	"time"
)

// item is somebody who waits for room on a device: a demand of the queue, a claim that a child has parked, or, with
// neither, a limit that more is charged than it allows.
type item struct {
	since    time.Duration
	demand   *demand
	part     *part
	need     int64
	shortage int64
}

// step looks at the device once, hands out the room there is in order of arrival, and sets about making more where somebody
// lacks it. It starts things and waits for none. The result is when to look again at the latest.
func (p *pool) step() time.Duration {
	v, err := p.look()
	m := p.manager
	if err != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		p.fail(err)
		return pollEvery
	}
	defer m.mu.Unlock()
	if m.over {
		return pollEvery
	}
	p.broken = false

	next := p.timers(v)
	short, again := p.serve(v)
	next = min(next, again)
	if !slices.ContainsFunc(short, func(it item) bool { return it.demand != nil }) {
		p.stopDraining()
	}
	if len(short) == 0 && v.room < 0 {
		short = []item{{shortage: -v.room}}
	}
	for _, it := range short {
		next = min(next, p.help(it, v))
	}
	return max(next, time.Millisecond)
}

// fail ends every wait with the reason why the ledger cannot be read. Held: Manager.mu.
func (p *pool) fail(err error) {
	if !p.broken {
		slog.Error("kvcached: no decisions can be made", "device", p.device.ID, "error", err)
	}
	p.broken = true
	for _, d := range slices.Clone(p.queue) {
		d.finish(err)
	}
	p.stopDraining()
}

// serve hands out room in order of arrival. It returns who lacks some: at most the first demand, which those behind it wait
// for, and the first parked claim, which does not wait for demands: its request runs, and others' turn comes when it ends.
func (p *pool) serve(v view) (short []item, next time.Duration) {
	next = pollEvery
	var waiting []item
	for _, d := range slices.Clone(p.queue) {
		waiting = append(waiting, item{since: d.since, demand: d})
	}
	for _, part := range p.parts {
		if d := part.cache.wake; part.claims() && !part.cache.left && (d == nil || d.running) {
			since := part.seen.WantsSince
			if part.cache.inFlight() > 0 {
				since = min(since, part.cache.began) // its request came before it lacked room
			}
			waiting = append(waiting, item{since: since, part: part, need: toRoom(part.seen.Wants)})
		}
	}
	slices.SortStableFunc(waiting, func(a, b item) int { return int(min(max(a.since-b.since, -1), 1)) })

	room := v.room
	blocked, claimed := false, false
	for _, it := range waiting {
		if it.part != nil {
			lacks := it.need - room
			room -= it.need
			if lacks <= 0 {
				// The child tries again by itself. If it goes on waiting, the device has less than the limit.
				if it.part.fits == 0 {
					it.part.fits = v.now
				}
				if age := v.now - it.part.fits; age < deviceShort {
					next = min(next, deviceShort-age)
					continue
				}
				lacks = it.need
			} else {
				it.part.fits = 0
			}
			if !claimed {
				it.shortage, claimed = lacks, true
				short = append(short, it)
			}
			continue
		}
		d := it.demand
		it.need = d.needOn(p)
		switch {
		case d.over:
		case d.running:
			// What it was given is not yet charged. If it parks meanwhile, its claim is in the list instead.
			if own := d.cache.on(p); own == nil || !own.claims() {
				room -= it.need
			}
		case blocked:
		case !d.wake && v.limit != NoLimit && p.manager.loads():
			// Loads follow each other, and one that has begun may lack room yet: no other's lease is to be in its way.
		case d.wake && d.cache.sleeping != 0:
			// Its child may hang: then the others need not wait for it.
			left := sleepCounts - (v.now - d.cache.sleeping)
			if blocked = left > 0; blocked {
				next = min(next, left)
			}
		case d.wake && p.waking != nil && p.waking != d:
			blocked = true
		case d.after > v.now:
			blocked = true
			next = min(next, d.after-v.now)
		case d.wake && !d.cache.asleep():
			d.finish(nil) // it was only held back, or woke by itself
		case it.need <= room && !d.short:
			room -= it.need
			p.grant(d, v)
		default:
			blocked = true
			d.granted[p] = false
			if p.waking == d {
				p.waking = nil
			}
			it.shortage = it.need - room
			if d.short {
				it.shortage = it.need
			}
			short = append(short, it)
		}
	}
	return short, next
}

// needOn is how much room a demand lacks on a device.
func (d *demand) needOn(p *pool) int64 {
	if !d.wake {
		return toRoom(d.need[p])
	}
	if part := d.cache.on(p); part != nil && part.there {
		// What a parked claim lacks has what sleeps in it, once its child has looked again.
		if d.bare {
			return toRoom(part.seen.Asleep)
		}
		if part.seen.Wants < part.seen.Asleep {
			return toRoom(part.seen.Asleep) + toRoom(part.seen.Wants)
		}
		return toRoom(part.seen.Wants)
	}
	return 0
}

// grant says that there is room for a demand on a device, and starts it when there is on all of its devices.
func (p *pool) grant(d *demand, v view) {
	m := p.manager
	d.granted[p] = true
	d.charged, d.limit = v.charge, v.limit
	if d.wake {
		p.waking = d
	}
	for _, other := range d.pools {
		if !d.granted[other] {
			return
		}
	}
	d.running, d.stuck = true, 0
	if !d.wake {
		d.ready <- struct{}{} // empty: nothing was granted since it was emptied
		return
	}
	var parts []*part
	bytes := uint64(0)
	for _, part := range d.cache.parts {
		if part.main && part.there && part.seen.Asleep > 0 {
			parts = append(parts, part)
			bytes += part.seen.Asleep
		}
	}
	m.spawn(func() { m.runWake(d, parts, bytes) })
}

// help makes room for somebody who lacks it: others' spare memory first, then the sleep of idle models, then the end of
// sleepers; and where all that are in use wait for each other, the sleep of the one that came last. Held: Manager.mu.
func (p *pool) help(it item, v view) time.Duration {
	m := p.manager
	it.tell(p, v)
	pending, _ := p.pending(v.now)
	lacks := it.shortage - pending
	if lacks <= 0 {
		it.moving(v.now)
		return pollEvery
	}
	st := p.stand(v.now)
	if len(st.spare) > 0 {
		for _, part := range st.spare {
			if lacks > 0 {
				lacks -= toRoom(part.spare())
				m.trim(part, it.shortage)
			}
		}
		it.moving(v.now)
		return pollEvery // its answer tells how much is still to be done
	}

	victims := st.idle
	if len(st.working) == 0 {
		victims = append(victims, st.woken...) // nobody else gets on, so these cannot be left their time
	}
	for _, part := range victims {
		if lacks > 0 {
			lacks -= toRoom(part.frees())
			m.sleep(part.cache, "room", it.shortage, v)
		}
	}
	if lacks <= 0 {
		it.moving(v.now)
		return pollEvery
	}

	// Sleepers go where their end is enough, or nothing else is left. Who is not working yet waits a moment before: to load
	// one again takes longer than most answers.
	var ends, soon int64
	for _, part := range st.gone {
		ends += toRoom(part.seen.Charge)
	}
	for _, part := range st.woken {
		soon += toRoom(part.frees())
	}
	_, moves := p.pending(v.now)
	moves = moves || len(st.working) > 0 || st.later != math.MaxInt64
	hurry := it.demand == nil || v.now-it.demand.since >= contextPatience
	enough := ends > 0 && lacks <= ends && lacks > soon && (hurry || !moves)
	if !moves && !enough && p.turn(it, st, v) {
		it.moving(v.now)
		return pollEvery
	}
	if enough || ends > 0 && !moves {
		for _, part := range st.gone {
			if lacks > 0 {
				lacks -= toRoom(part.seen.Charge)
				m.unload(part.cache, "its context is needed")
			}
		}
		it.moving(v.now)
		return pollEvery
	}
	if moves {
		it.moving(v.now)
		next := min(st.later, p.drain(it, st, v, lacks))
		if !hurry {
			next = min(next, contextPatience-(v.now-it.demand.since))
		}
		return next
	}
	if it.demand != nil && len(st.parked) > 0 {
		return pollEvery // whose claims are refused before
	}
	return p.stuck(it, v)
}

// turn lets one of those that wait for each other go on: it puts the parked model to sleep that came last, unless it is the
// first of all. It says whether something was done.
func (p *pool) turn(it item, st standing, v view) bool {
	if len(st.parked) == 0 || it.demand == nil && it.part == nil {
		return false
	}
	first := st.parked[0]
	older := slices.ContainsFunc(p.queue, func(d *demand) bool { return d.since < first.cache.began })
	loading := slices.ContainsFunc(st.parked, func(o *part) bool { return !o.cache.used })
	for _, part := range slices.Backward(st.parked) {
		c := part.cache
		if !c.used || !part.seen.Controlled || c.retry > v.now || part.frees() == 0 {
			continue
		}
		// The first stays awake, but where it waits with one that loads: that one cannot sleep.
		if part == first && !older && !loading {
			continue
		}
		p.manager.sleep(c, "turn", it.shortage, v)
		return true
	}
	return false
}

// stuck deals with somebody whom nothing can help that this server decides about: a model that can spill gets what there
// is, others are refused.
func (p *pool) stuck(it item, v view) time.Duration {
	if it.shortage <= 0 || v.foreign || it.demand == nil && it.part == nil {
		return pollEvery // others' memory, or their limit: it may change
	}
	since := it.stuckSince()
	if *since == 0 {
		*since = v.now
	}
	if left := settled - (v.now - *since); left > 0 {
		return left
	}
	*since = 0
	d := it.demand
	switch {
	case d == nil:
		p.manager.refuse(it.part, v)
	case d.turn && !d.bare:
		// Not with what its claim lacks: let it wake without, to fail as it would have.
		d.bare = true
		p.kick()
	case d.wake:
		d.cache.lost = d.turn
		err := p.refusal(d.cache.name, Need{Weights: uint64(it.need)}, v)
		d.finish(&WakeError{Model: d.cache.name, Err: err})
	case d.cache.whole || v.room <= 0:
		d.finish(p.refusal(d.cache.name, d.cache.shareOf(p), v))
	default:
		slog.Info("kvcached: less than asked for", "model", d.cache.name, "device", p.device.ID, "need", FormatSize(d.need[p]),
			"room", FormatSize(uint64(v.room)), "limit", sizeOrNone(v.limit))
		d.need[p] = uint64(v.room)
		p.kick()
	}
	return pollEvery
}

func (it item) stuckSince() *time.Duration {
	if it.demand != nil {
		return &it.demand.stuck
	}
	return &it.part.stuck
}

// moving says that somebody gets helped, or may be: he is not stuck.
func (it item) moving(now time.Duration) {
	if it.demand == nil && it.part == nil {
		return
	}
	*it.stuckSince() = 0
	if d := it.demand; d != nil && d.short {
		d.short, d.after = false, now+time.Second // whether the device has room then shows by trying
	}
}

// tell logs once that somebody waits, with the numbers.
func (it item) tell(p *pool, v view) {
	var c *KVCache
	what := "claim"
	switch {
	case it.demand != nil && !it.demand.told:
		it.demand.told = true
		c, what = it.demand.cache, "admission"
		if it.demand.wake {
			what = "wake"
		}
	case it.part != nil && it.part.told != it.part.seen.WantsSince:
		it.part.told = it.part.seen.WantsSince
		c = it.part.cache
	default:
		return
	}
	slog.Info("kvcached: waiting for room", "model", c.name, "for", what, "device", p.device.ID, "need", FormatSize(uint64(it.need)),
		"short", FormatSize(uint64(max(it.shortage, 0))), "charged", FormatSize(v.charge), "limit", sizeOrNone(v.limit))
}
