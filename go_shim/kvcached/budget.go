package kvcached

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"
)

const (
	// budgetSteps is into how many parts a service's limit is divided at most: what is charged there is rounded up to one.
	budgetSteps = 64
	// budgetUnit is the part where the service has no limit.
	budgetUnit = 1 << 30
	// budgetLeases is how many leases a budget consists of at most: each takes a slot of the service's ledger.
	budgetLeases = 8
	// budgetKnown is how long the service's word holds; with the service down a server goes on by its own ledger.
	budgetKnown = 4 * serviceEvery
)

// budget is what the models on a device are charged at the service, where that has another ledger for the device: it is
// another user's, or another container's, and sees nothing of this server's children. It follows their charge: what a lease
// adds is asked for before the child is started, the rest (growth, sleep, wake) is carried over after a look. With one
// ledger for both there is nothing to do: the service's limit is in it.
type budget struct {
	changing sync.Mutex // one change at a time; taken before Manager.mu
	leases   []*ServiceLease

	// Protected by Manager.mu.
	device  string // as the service calls it; "" where it needs no budget
	held    uint64 // sum of the leases
	limit   uint64 // the service's, of all together
	others  uint64 // charged there to others
	seen    time.Duration
	refused bool // it was logged that there is less than the charge
}

// followService connects to the service of the settings, for the life of the manager. Held: nothing, nobody knows m yet.
func (m *Manager) followService() {
	if m.settings.Socket == "" {
		return
	}
	m.service = NewClient(m.settings.Socket, m.settings.Group)
	ctx, cancel := context.WithCancel(context.Background())
	m.stopService = cancel
	m.running.Add(2)
	go func() { defer m.running.Done(); m.service.Follow(ctx, m.heard) }()
	go func() { defer m.running.Done(); m.keepBudgets(ctx) }()
}

// heard takes over what the service says about the devices.
func (m *Manager) heard(stats *ServiceStats) {
	m.mu.Lock()
	pools := slices.Clone(m.pools)
	m.mu.Unlock()
	for _, p := range pools {
		i := slices.IndexFunc(stats.Devices, func(d ServiceDevice) bool { return p.named(d.Device) })
		apart := i >= 0 && !stats.Devices[i].Same(p.ledger.Path())
		m.mu.Lock()
		b := &p.budget
		before := b.device
		b.device = ""
		if apart {
			d := stats.Devices[i]
			b.device, b.seen, b.limit = d.Device, m.library.Monotonic(), NoLimit
			if d.Limit >= 0 {
				b.limit = uint64(d.Limit)
			}
			charge := uint64(max(d.Charge, 0))
			b.others = charge - min(charge, b.held)
		}
		if before == "" && apart {
			slog.Info("kvcached: the service has another ledger for a device; this server's models take a budget there", "device", p.device.ID,
				"ledger", p.ledger.Path(), "service_ledger", stats.Devices[i].Ledger, "limit", sizeOrNone(b.limit), "charged_to_others", FormatSize(b.others))
		}
		m.mu.Unlock()
		p.kick()
	}
}

// named says whether the service means this device.
func (p *pool) named(device string) bool {
	return device == p.device.ID || busID(device) == p.device.ID || p.device.ID != HostID && device != "" && device == gpuUUID(p.device.ID)
}

// known says whether the service's limit bounds what this server may charge. Held: Manager.mu.
func (b *budget) known(now time.Duration) bool { return b.device != "" && now-b.seen < budgetKnown }

// bound takes the service's limit into account. Held: Manager.mu.
func (b *budget) bound(v *view) {
	if !b.known(v.now) || b.limit == NoLimit {
		return
	}
	v.most = min(v.most, b.limit)
	if room := toRoom(b.limit) - toRoom(b.others) - toRoom(v.charge); room < v.room {
		v.room, v.foreign = room, b.others > 0
	}
}

// keepBudgets carries what is charged in the ledgers over to the service, until ctx ends.
func (m *Manager) keepBudgets(ctx context.Context) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		m.mu.Lock()
		pools := slices.Clone(m.pools)
		m.mu.Unlock()
		for _, p := range pools {
			if err := p.cover(ctx); err != nil && ctx.Err() == nil {
				p.uncovered(err)
			}
		}
	}
}

// uncovered logs once that more is charged here than the service has room for.
func (p *pool) uncovered(err error) {
	p.manager.mu.Lock()
	defer p.manager.mu.Unlock()
	if !p.budget.refused {
		slog.Warn("kvcached: the service does not count all that is in use", "device", p.device.ID,
			"held", FormatSize(p.budget.held), "limit", sizeOrNone(p.budget.limit), "error", err)
	}
	p.budget.refused = true
}

// cover has the budget at the service match the charge in the ledger. It waits for the service, not for room: ErrLimit says
// that there is none. A service that is down is no error. Not held: Manager.mu.
func (p *pool) cover(ctx context.Context) error {
	m, b := p.manager, &p.budget
	if m.service == nil {
		return nil
	}
	b.changing.Lock()
	defer b.changing.Unlock()
	m.mu.Lock()
	quiet := m.over || b.device == "" && b.held == 0
	quiet = quiet || b.device != "" && !b.known(m.library.Monotonic()) // it is down, or hangs
	m.mu.Unlock()
	if quiet {
		return nil
	}
	v, err := p.look()
	if err != nil {
		return err
	}
	device := b.device
	least, want := uint64(0), uint64(0)
	if device != "" {
		unit := uint64(budgetUnit)
		if b.limit != NoLimit {
			unit = max(b.limit/budgetSteps, 1)
		}
		least = v.charge
		want = (least + unit - 1) / unit * unit
	}
	m.mu.Unlock()

	shrunk, err := b.shrink(want)
	if err == nil {
		if err = b.grow(ctx, m.service, device, m.group, want); errors.Is(err, ErrLimit) {
			err = b.grow(ctx, m.service, device, m.group, least)
		}
	}
	m.mu.Lock()
	b.held = b.sum()
	if b.held >= least {
		b.refused = false
	}
	m.mu.Unlock()
	if shrunk {
		p.kick()
	}
	var down *ServiceDown
	if errors.As(err, &down) {
		return nil
	}
	return err
}

// sum is the size of the leases. Held: changing.
func (b *budget) sum() (bytes uint64) {
	for _, lease := range b.leases {
		bytes += uint64(lease.request.Size)
	}
	return bytes
}

// shrink gives leases back that are too much: whole ones, the last first. Held: changing.
func (b *budget) shrink(want uint64) (shrunk bool, err error) {
	for len(b.leases) > 0 && b.sum() > want {
		last := b.leases[len(b.leases)-1]
		b.leases = b.leases[:len(b.leases)-1]
		shrunk = true
		if err = last.Free(); err != nil {
			return shrunk, err
		}
	}
	return shrunk, nil
}

// grow takes a lease of what is missing. Held: changing.
func (b *budget) grow(ctx context.Context, service *Client, device, group string, want uint64) error {
	have := b.sum()
	if have >= want {
		return nil
	}
	if len(b.leases) >= budgetLeases {
		// One in place of several.
		if _, err := b.shrink(uint64(b.leases[0].request.Size)); err != nil {
			return err
		}
		have = b.sum()
	}
	ctx, cancel := context.WithTimeout(ctx, serviceWait)
	defer cancel()
	lease, err := service.Allocate(ctx, ServiceRequest{Size: int64(want - have), Model: group, Device: device})
	if err != nil {
		return err
	}
	b.leases = append(b.leases, lease)
	return nil
}
