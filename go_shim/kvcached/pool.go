package kvcached

import (
	"fmt"
	"log/slog"
	"math"
	"slices"
	"time"
)

const (
	// pollEvery is how long a pool goes without a look at its ledger when no bell rings.
	pollEvery = time.Second
	// settled is how long nothing may be left to help before a claim is refused: what has just ended may still show.
	settled = time.Second
	// awakeAtLeast is how long nobody is put to sleep who has just been woken.
	awakeAtLeast = 2 * time.Second
	// sleepCounts is how long a sleep under way is taken for room to come.
	sleepCounts = 15 * time.Second
	// sleepTries is how many commands to sleep may fail until nobody waits for a model to give way.
	sleepTries = 2
	// contextPatience is how long a model waits for others that are in use before sleepers are unloaded for it.
	contextPatience = 2 * time.Second
	// patience is how long a model at the head of the queue waits for others that are in use, before they get no further
	// requests ahead of it.
	patience = 5 * time.Second
	// deviceShort is how long a claim may be parked beside free room before it is taken that the device itself has none.
	deviceShort = time.Second
)

// pool is the memory of one device: its ledger, its limit, and who waits for room in it. Two goroutines serve it: one
// waits for the ledger's bell, the other decides (room.go). All fields below mu's line are protected by Manager.mu.
type pool struct {
	manager *Manager
	device  Device
	ledger  Ledger
	kicked  chan struct{} // holds one: something changed

	limit   uint64 // holds while none is set in the ledger
	source  string // who says so
	context uint64 // what a child measured of its own; 0: none did yet
	changed bool   // the limit was last set through the ledger
	queue   []*demand
	waking  *demand
	parts   []*part
	broken  bool // the last look failed, and was logged
	budget  budget
}

func (m *Manager) newPool(device Device, ledger Ledger) *pool {
	return &pool{manager: m, device: device, ledger: ledger, kicked: make(chan struct{}, 1), limit: NoLimit}
}

// startPool starts the goroutines of a pool; they end with Manager.Close. Held: mu.
func (m *Manager) startPool(p *pool) {
	m.running.Add(2)
	go func() { defer m.running.Done(); p.listen() }()
	go func() { defer m.running.Done(); p.decide() }()
}

// update takes over what a newer list of devices says. Held: mu.
func (p *pool) update(device Device) {
	p.device.Free = device.Free
	if p.device.Total == 0 && device.Total != 0 {
		p.device.Total = device.Total
		if !p.changed {
			p.limit, p.source = p.manager.deviceLimit(p.device)
		}
	}
}

// kick has the pool decide anew. It never blocks.
func (p *pool) kick() {
	select {
	case p.kicked <- struct{}{}:
	default:
	}
}

// listen kicks the pool when the ledger's bell rings, and once a second whatever happens.
func (p *pool) listen() {
	var seen uint32
	silent := false
	for {
		now, err := p.ledger.Wait(seen, pollEvery)
		if err != nil {
			if !silent {
				slog.Warn("kvcached: the ledger's bell cannot be heard; it is read once a second", "device", p.device.ID, "error", err)
			}
			silent = true
			select {
			case <-time.After(pollEvery):
			case <-p.manager.closed:
			}
		} else {
			seen, silent = now, false
		}
		select {
		case <-p.manager.closed:
			return
		default:
			p.kick()
		}
	}
}

// decide looks at the ledger and acts, whenever something changed or a time has come.
func (p *pool) decide() {
	timer := time.NewTimer(pollEvery)
	defer timer.Stop()
	for {
		select {
		case <-p.manager.closed:
			return
		case <-p.kicked:
		case <-timer.C:
		}
		timer.Reset(p.step())
	}
}

// view is what a look at the ledger showed.
type view struct {
	now     time.Duration
	limit   uint64   // of the group, in force
	charge  uint64   // of the group
	most    uint64   // that a model could have alone
	room    int64    // bytes that may still be charged; negative: more is in use
	foreign bool     // it is others' memory that is in the way, under the limit of all groups
	charges []Charge // of the group's slots
}

// toRoom is bytes as a signed number that sums do not overflow.
func toRoom(bytes uint64) int64 { return int64(min(bytes, math.MaxInt64/4)) }

// look reads the ledger and, where that went well, returns with Manager.mu held: the parts show the slots as they are.
func (p *pool) look() (view, error) {
	views, err := p.manager.look([]*pool{p})
	if err != nil {
		return view{}, err
	}
	return views[0], nil
}

// look reads the ledgers of several pools in the same way.
func (m *Manager) look(pools []*pool) ([]view, error) {
	type reading struct {
		slots    []Slot
		own, all Limit
	}
	for {
		m.mu.Lock()
		before := m.commands
		m.mu.Unlock()

		readings := make([]reading, len(pools))
		for i, p := range pools {
			r, err := &readings[i], error(nil)
			if r.slots, err = p.ledger.Slots(); err == nil {
				r.own, err = p.ledger.Limit(m.group)
			}
			if err == nil {
				r.all, err = p.ledger.Limit("")
			}
			if err != nil {
				return nil, fmt.Errorf("kvcached: the ledger of %s cannot be read: %w", p.device.ID, err)
			}
		}

		m.mu.Lock()
		// What a command changed meanwhile may not show in what was read before its end.
		if before == m.commands {
			views := make([]view, len(pools))
			for i, p := range pools {
				views[i] = p.see(readings[i].slots, readings[i].own, readings[i].all)
			}
			return views, nil
		}
		m.mu.Unlock()
	}
}

// see takes over what was read. Held: mu.
func (p *pool) see(slots []Slot, own, all Limit) view {
	m := p.manager
	v := view{now: m.library.Monotonic()}
	bySlot := make(map[int]*Slot, len(slots))
	var total uint64
	for i := range slots {
		s := &slots[i]
		total += s.Charge
		if s.Group == m.group {
			bySlot[s.Index] = s
			v.charge += s.Charge
			if s.Context > 0 {
				p.context = s.Context
			}
			v.charges = append(v.charges, Charge{Model: s.Name, Bytes: s.Charge})
		}
	}
	sortCharges(v.charges)

	// A limit set by others stays this server's: the ledger forgets it with the group's last slot.
	if own.Revision > 0 && own.Bytes != p.limit && own.Bytes != inLedger(p.limit) {
		slog.Info("kvcached: the limit was set", "device", p.device.ID, "limit", sizeOrNone(own.Bytes), "before", sizeOrNone(p.limit),
			"charged", FormatSize(v.charge))
		p.limit, p.source, p.changed = own.Bytes, "a command while the server runs", true
	}
	v.limit = p.limit
	if own.Revision > 0 {
		v.limit = own.Bytes
	}
	v.most = v.limit
	v.room = toRoom(v.limit) - toRoom(v.charge)
	if all.Revision > 0 && all.Bytes != NoLimit {
		v.most = min(v.most, all.Bytes)
		if room := toRoom(all.Bytes) - toRoom(total); room < v.room {
			v.room, v.foreign = room, total > v.charge
		}
	}

	p.budget.bound(&v)

	for _, part := range p.parts {
		s := bySlot[part.slot]
		part.there = s != nil
		if s != nil {
			if s.WantsSince != part.seen.WantsSince {
				part.fits, part.stuck = 0, 0
			}
			part.seen = *s
		}
	}
	for _, part := range p.parts {
		part.cache.observe(v.now)
	}
	return v
}

// remove takes a part out. Held: mu.
func (p *pool) remove(gone *part) {
	p.parts = slices.DeleteFunc(p.parts, func(part *part) bool { return part == gone })
}

// inLedger is a limit as the ledger keeps it: in units of a small page.
func inLedger(limit uint64) uint64 {
	if limit == NoLimit {
		return limit
	}
	return limit &^ 4095
}

// announce sets the limit in the ledger, where the group has just got its first slot there: so that others see it, and it
// can be changed while the server runs. A limit that was set is left alone. Not held: Manager.mu.
func (p *pool) announce(limit uint64) {
	group := p.manager.group
	set, err := p.ledger.Limit(group)
	if err == nil && set.Revision == 0 && limit != NoLimit {
		_, err = p.ledger.SetLimit(group, limit)
	}
	if err != nil {
		slog.Warn("kvcached: the limit is kept, but cannot be shown in the ledger", "device", p.device.ID, "limit", sizeOrNone(limit), "error", err)
	}
}
