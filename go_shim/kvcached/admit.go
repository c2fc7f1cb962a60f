package kvcached

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Request asks for room for a model that is to be loaded.
type Request struct {
	Model   string // its file
	Name    string // what the user calls it; "" for what is known
	Need    Need   // on all devices together; Context and Compute are of each
	Devices []Device
	Pinned  bool // keep_alive -1: it is never unloaded
	Whole   bool // there is nothing else it could spill to: it fits in full, or not at all
}

// Admit makes room for a model on its devices, waits for it while ctx lives, and takes the leases. The child may then be
// started with the cache's Env. It returns a *LimitError when the model does not fit even alone; a model that can spill to
// the CPU gets a lease of what there is instead. Until its first Begin the model counts as loading: nobody's victim.
func (m *Manager) Admit(ctx context.Context, r Request) (*KVCache, error) {
	if r.Need.Total() == 0 {
		return nil, fmt.Errorf("kvcached: model %s was asked to be admitted with no need", r.Model)
	}
	m.SetName(r.Model, r.Name)
	c, err := m.newCache(r)
	if err != nil {
		return nil, err
	}
	d, err := c.queue()
	if err != nil {
		return nil, err
	}
	since := d.since
	for {
		select {
		case <-ctx.Done():
			m.mu.Lock()
			d.finish(ctx.Err())
			m.mu.Unlock()
			return nil, ctx.Err()
		case <-d.done:
			if d.err != nil {
				slog.Info("kvcached: not admitted", "model", c.name, "need", FormatSize(c.need.Total()), "reason", d.err)
			}
			return nil, d.err
		case <-d.ready:
		}
		taken, err := c.take(d)
		if err != nil {
			return nil, err
		}
		if taken {
			slog.Info("kvcached: admitted", "model", c.name, "need", FormatSize(c.need.Total()), "lease", FormatSize(c.leased()),
				"charged", FormatSize(d.charged), "limit", sizeOrNone(d.limit), "devices", len(c.shares), "waited", m.library.Monotonic()-since)
			return c, nil
		}
	}
}

// take takes the leases that there was room for a moment ago, and ends the demand with it. Somebody else may have been
// faster: then it stays in the queue.
func (c *KVCache) take(d *demand) (taken bool, err error) {
	m := c.manager
	m.mu.Lock()
	if d.over {
		m.mu.Unlock()
		return false, d.err
	}
	size := uint64(0)
	for i := range c.shares {
		s := &c.shares[i]
		if s.main {
			s.size = d.need[s.pool]
		}
		size += s.size
	}
	m.mu.Unlock()

	err = c.Allocate(int(size))

	m.mu.Lock()
	d.running = false
	clear(d.granted)
	var full *LimitError
	switch {
	case d.over && err == nil: // the manager was closed meanwhile
		m.mu.Unlock()
		c.Free()
		return false, d.err
	case err == nil:
		taken = true
		d.finish(nil)
	case errors.As(err, &full):
		d.after = m.library.Monotonic() + min(50*time.Millisecond<<min(d.tries, 5), time.Second)
		d.tries++
		err = nil
	default:
		d.finish(err)
	}
	m.mu.Unlock()
	m.kick()
	return taken, err
}

// queue puts a model into the queues of its devices, or refuses it.
func (c *KVCache) queue() (*demand, error) {
	m := c.manager
	pools := c.mainPools()
	views, err := m.look(pools)
	if err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	if m.over {
		return nil, errClosed
	}
	c.divide(views)
	d := m.newDemand(c, pools, views[0].now)
	d.need = map[*pool]uint64{}
	for i, p := range pools {
		d.need[p] = c.shares[i].need.Total()
		if d.need[p] <= views[i].most {
			continue
		}
		if c.whole {
			refusal := p.refusal(c.name, c.shares[i].need, views[i])
			slog.Info("kvcached: refused, it would not fit alone", "model", c.name, "device", p.device.ID,
				"need", FormatSize(d.need[p]), "limit", sizeOrNone(views[i].most))
			return nil, refusal
		}
		d.need[p] = views[i].most
	}
	d.enqueue()
	return d, nil
}

// newCache is a cache on the devices of a request, the main ones first.
func (m *Manager) newCache(r Request) (*KVCache, error) {
	c := &KVCache{manager: m, model: r.Model, name: m.Name(r.Model), need: r.Need, whole: r.Whole, pinned: r.Pinned}
	onHost := true
	for _, device := range r.Devices {
		p, err := m.poolOf(device)
		if err != nil {
			return nil, fmt.Errorf("kvcached: model %s cannot be admitted: %w", c.name, err)
		}
		if p != m.host {
			c.shares = append(c.shares, share{pool: p, main: true})
			onHost = false
		}
	}
	if onHost {
		c.shares = []share{{pool: m.host, need: r.Need, main: true}}
		return c, nil
	}
	// What a model on a GPU has in host memory is told, and bounded by nothing.
	c.shares = append(c.shares, share{pool: m.host, need: Need{Outside: r.Need.Outside}, size: hostLease})
	return c, nil
}

// hostLease is what a model on a GPU sets aside in host memory: a page, so that it has a slot there.
const hostLease = HostPage

// divide gives each GPU its share of the need, by free memory and within its limit. Held: Manager.mu.
func (c *KVCache) divide(views []view) {
	if measured := c.shares[0].pool.context; measured > 0 && c.need.Context > 0 {
		c.need.Context = measured // what it takes on this machine, rather than on others
	}
	if len(views) == 1 {
		c.shares[0].need = c.need
		if c.shares[0].pool != c.manager.host {
			c.shares[0].need.Outside = 0 // a GPU's weights are claimed there
		}
		return
	}
	parts := make([]uint64, len(views))
	for i := range views {
		free := c.shares[i].pool.device.Free
		if free == 0 {
			free = c.shares[i].pool.device.Total
		}
		own := c.need.Context + c.need.Compute
		free = min(free, views[i].most)
		parts[i] = max(free-min(free, own), 1)
	}
	for i, need := range c.need.Split(parts) {
		need.Outside = 0
		c.shares[i].need = need
	}
}

// shareOf is what the model is to have on a device.
func (c *KVCache) shareOf(p *pool) Need {
	for _, s := range c.shares {
		if s.pool == p {
			return s.need
		}
	}
	return c.need
}

// mainPools are the devices that the model sleeps and wakes on.
func (c *KVCache) mainPools() []*pool {
	var pools []*pool
	for _, s := range c.shares {
		if s.main {
			pools = append(pools, s.pool)
		}
	}
	return pools
}

// leased is the size of all leases taken.
func (c *KVCache) leased() uint64 {
	c.manager.mu.Lock()
	defer c.manager.mu.Unlock()
	var sum uint64
	for _, s := range c.shares {
		sum += s.size
	}
	return sum
}
