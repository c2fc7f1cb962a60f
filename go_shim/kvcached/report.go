package kvcached

import (
	"fmt"
	"slices"
	"strings"
)

// States of a model in reports.
const (
	StateLeased   = "leased"  // memory is set aside; the child has not opened its slot
	StateLoading  = "loading" // the child loads, no request has held it yet
	StateAwake    = "awake"
	StateSleeping = "sleeping" // it is going to sleep
	StateAsleep   = "asleep"
	StateWaking   = "waking" // it is waking, or waits for its turn to
)

// State is the model's, as of the last look at its ledgers.
func (c *KVCache) State() string {
	c.manager.mu.Lock()
	defer c.manager.mu.Unlock()
	return c.state()
}

func (c *KVCache) state() string {
	attached := false
	for _, part := range c.parts {
		attached = attached || part.there && part.seen.Attached
	}
	switch {
	case c.sleeping != 0:
		return StateSleeping
	case c.asleep() && c.wake != nil:
		return StateWaking
	case c.asleep():
		return StateAsleep
	case !attached && !c.used:
		return StateLeased
	case !c.used:
		return StateLoading
	}
	return StateAwake
}

// Stats is what one model occupies, on all of its devices together. Sizes are bytes.
type Stats struct {
	Model    string // its file
	Name     string
	State    string
	PID      int64
	Mapped   uint64 // KV cache that is there; weights and compute buffers are not in it
	Reserved uint64 // KV cache that could be
	Weights  uint64 // that are there through the library
	Context  uint64 // of its contexts on GPUs
	Host     uint64 // host memory that holds what sleeps
	VRAM     uint64 // of GPUs, mapped through the library; contexts are not in it
	OnGPU    bool   // it has a share of a GPU
	Lease    uint64
	Charge   uint64 // what counts against the limit
	Limit    uint64 // in force on its first device; NoLimit for none
}

// Stats lists the models of this server that hold a lease, in order of their names. Each ledger is read once.
func (m *Manager) Stats() ([]Stats, error) {
	m.mu.Lock()
	pools := slices.Clone(m.pools)
	m.mu.Unlock()
	if _, err := m.look(pools); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	var list []Stats
	for c := range m.caches {
		s := Stats{Model: c.model, Name: c.name, State: c.state(), Limit: NoLimit}
		for i, part := range c.parts {
			if i == 0 {
				s.Limit = part.pool.limit // as it was set; the ledger rounds it
				s.PID = part.seen.PID
			}
			onGPU := part.pool != m.host
			s.OnGPU = s.OnGPU || onGPU
			if !part.there {
				continue
			}
			if onGPU {
				s.VRAM += part.seen.Claim
			}
			s.Mapped += part.seen.KV
			s.Reserved += part.reserved()
			s.Weights += part.seen.Weights
			s.Context += part.seen.Context
			s.Host += part.seen.HostBytes
			s.Lease += part.seen.Lease
			s.Charge += part.seen.Charge
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b Stats) int { return strings.Compare(a.Name+"\x00"+a.Model, b.Name+"\x00"+b.Model) })
	return list, nil
}

// reserved is the address space of the KV cache.
func (p *part) reserved() uint64 { return p.seen.KindReserved[KindKV] }

// Describe says in one line what is managed, for the log.
func (m *Manager) Describe() string {
	limit := sizeOrNone(m.settings.Limit)
	if m.settings.Limit != NoLimit {
		limit += " (" + m.settings.Source + ")"
	}
	return fmt.Sprintf("libkvcached %s, ledger %s, group %s, limit %s, policy %s",
		m.library.Version(), m.host.ledger.Path(), m.group, limit, m.policy.Name())
}

// refusal is the error for a model that a pool has no room for. Held: Manager.mu.
func (p *pool) refusal(name string, need Need, v view) *LimitError {
	e := &LimitError{Model: name, Need: need, Limit: v.most, Source: p.source, Others: v.charges}
	if p != p.manager.host {
		e.Device = p.device.Name
		if e.Device == "" {
			e.Device = p.device.ID
		}
	}
	if v.most < v.limit {
		e.Source = "the limit of all servers together"
	}
	return e
}

// Charge is what one model counts against the limit.
type Charge struct {
	Model string
	Bytes uint64
}

// sortCharges puts the largest first.
func sortCharges(charges []Charge) {
	slices.SortStableFunc(charges, func(a, b Charge) int {
		switch {
		case a.Bytes > b.Bytes:
			return -1
		case a.Bytes < b.Bytes:
			return 1
		}
		return strings.Compare(a.Model, b.Model)
	})
}

// LimitError refuses a model that the limit has no room for. Nothing was started or changed.
type LimitError struct {
	Model  string
	Device string // "" for host memory
	Need   Need   // on that device
	Limit  uint64
	Source string   // the variable, or the file and line, that set the limit
	Others []Charge // what other models of this server are charged, largest first
}

// Charged is the sum over Others.
func (e *LimitError) Charged() uint64 {
	var sum uint64
	for _, charge := range e.Others {
		sum += charge.Bytes
	}
	return sum
}

// FitsAlone says whether the model would fit if the others were gone.
func (e *LimitError) FitsAlone() bool { return e.Need.Total() <= e.Limit }

// needText is the need with its parts.
func (e *LimitError) needText() string {
	parts := []string{"weights " + FormatSize(e.Need.Weights), "first KV step " + FormatSize(e.Need.FirstStep)}
	if e.Need.Compute > 0 {
		parts = append(parts, "compute "+FormatSize(e.Need.Compute))
	}
	if e.Need.Context > 0 {
		parts = append(parts, "context "+FormatSize(e.Need.Context))
	}
	return FormatSize(e.Need.Total()) + " (" + strings.Join(parts, ", ") + ")"
}

// Error must not contain words that Ollama takes for a crash of the device: it would unload every model in reply.
func (e *LimitError) Error() string {
	var text strings.Builder
	where := ""
	if e.Device != "" {
		where = " on " + e.Device
	}
	fmt.Fprintf(&text, "kvcached: model %s needs %s%s, but the limit for all models together is %s, set by %s",
		e.Model, e.needText(), where, FormatSize(e.Limit), e.Source)
	if len(e.Others) > 0 {
		listed := make([]string, 0, len(e.Others))
		for _, charge := range e.Others {
			listed = append(listed, fmt.Sprintf("%s %s", charge.Model, FormatSize(charge.Bytes)))
		}
		fmt.Fprintf(&text, ", and others are charged %s of it (%s)", FormatSize(e.Charged()), strings.Join(listed, ", "))
	}
	switch {
	case e.FitsAlone() && len(e.Others) == 0:
		// the others ended between the refusal and the look at who was charged
		text.WriteString("; another model has just made room, try again")
	case e.FitsAlone():
		fmt.Fprintf(&text, "; stop another model (ollama stop %s) or raise the limit to %s or more",
			e.Others[0].Model, FormatSize(e.Need.Total()+e.Charged()))
	default:
		fmt.Fprintf(&text, "; raise the limit to %s or more, or use a smaller model", FormatSize(e.Need.Total()))
	}
	return text.String()
}
