package kvcached

import (
	"log/slog"
	"math"
	"slices"
	"time"
)

// standing is what a device's models could do for somebody who lacks room.
type standing struct {
	spare   []*part // of idle models: memory that holds nothing
	idle    []*part // may sleep now
	woken   []*part // may sleep when they were awake for a while
	later   time.Duration
	gone    []*part // sleepers that may be unloaded
	parked  []*part // in use, and all of it waits for room
	working []*part // in use, or on the way to it
}

// stand sorts the models by what they could do, those that are to go first at the front.
func (p *pool) stand(now time.Duration) standing {
	st := standing{later: math.MaxInt64}
	for _, part := range p.parts {
		c := part.cache
		switch {
		case !part.main || c.sleeping != 0 || c.unloading != 0 || c.trimming:
		case c.wake != nil && c.wake.running:
			st.working = append(st.working, part)
		case c.wake != nil && c.asleep():
			// its requests wait for their turn
		case c.parked() && !c.left:
			st.parked = append(st.parked, part)
		case c.inUse():
			st.working = append(st.working, part)
		case c.waiting > 0 && !c.draining():
			st.working = append(st.working, part) // let through in a moment
		case c.mayUnload() && (c.asleep() || !part.seen.Controlled):
			st.gone = append(st.gone, part)
		case part.seen.Asleep > 0:
			// nothing to be had
		case part.frees() == 0 || !part.seen.Controlled || c.hostShort:
		case c.retry > now:
			if c.failed < sleepTries {
				st.later = min(st.later, c.retry-now)
			}
		default:
			if spare := part.spare(); spare > 0 && spare != part.tried {
				st.spare = append(st.spare, part)
			}
			if c.lastWoke()+awakeAtLeast > now && c.lastWoke() > 0 {
				st.woken = append(st.woken, part)
				st.later = min(st.later, c.lastWoke()+awakeAtLeast-now)
			} else {
				st.idle = append(st.idle, part)
			}
		}
	}
	for _, list := range [][]*part{st.spare, st.idle, st.woken, st.gone, st.working} {
		slices.SortStableFunc(list, func(a, b *part) int { return p.manager.policy.Compare(a.victim(), b.victim()) })
	}
	slices.SortStableFunc(st.parked, func(a, b *part) int { return int(min(max(a.cache.began-b.cache.began, -1), 1)) })
	return st
}

// pending is what things under way will free, and whether there are any. A sleep that takes very long is not counted on: its
// child may hang.
func (p *pool) pending(now time.Duration) (bytes int64, moves bool) {
	for _, part := range p.parts {
		c := part.cache
		switch {
		case c.unloading != 0:
			bytes += toRoom(part.seen.Charge)
		case !part.main:
			continue
		case c.sleeping != 0:
			if now-c.sleeping < sleepCounts {
				bytes += toRoom(part.frees())
			}
		case c.trimming:
			bytes += toRoom(part.spare())
		default:
			continue
		}
		moves = true
	}
	return bytes, moves
}

// drain has models that are in use take no further requests ahead of a demand that has waited long enough.
func (p *pool) drain(it item, st standing, v view, lacks int64) time.Duration {
	if it.demand == nil {
		return pollEvery
	}
	if waited := v.now - it.demand.since; waited < patience {
		return patience - waited
	}
	for _, part := range st.working {
		c := part.cache
		if lacks <= 0 {
			break
		}
		if !c.used || part.frees() == 0 || c.wake != nil && c.wake.running || c.lastWoke()+awakeAtLeast > v.now && c.lastWoke() > 0 {
			continue
		}
		if !part.draining {
			slog.Info("kvcached: new requests wait behind another model's", "model", c.name, "for", it.demand.cache.name,
				"waited", v.now-it.demand.since)
		}
		part.draining = true
		lacks -= toRoom(part.frees())
	}
	return pollEvery
}

// stopDraining lets requests of models that were held back through.
func (p *pool) stopDraining() {
	for _, part := range p.parts {
		if part.draining {
			part.draining = false
			p.kick()
		}
	}
}
