package kvcached

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// LedgerVariable names the ledger to use instead of the user's own. The server hands its ledger to its children in it.
const LedgerVariable = "KVCACHED_LEDGER"

// Manager is the budget of one server: its ledger, its limit and the caches of its children.
type Manager struct {
	settings Settings
	library  Library
	group    string
	ledger   Ledger

	mu     sync.Mutex
	caches map[int]*KVCache  // by slot; those that hold a lease
	names  map[string]string // model file: the name its user knows
}

var current atomic.Pointer[Manager]

// Default is the manager of this process, nil when elastic memory is off or not supported.
func Default() *Manager { return current.Load() }

// SetDefault makes m the manager of this process; nil for none.
func SetDefault(m *Manager) { current.Store(m) }

// Start opens the library found in the first of directories that has it, and the ledger. With settings not enabled it
// touches nothing and returns nil. It returns ErrUnsupported in a build without the library's glue, and otherwise an
// error that says what to do: a server that was asked for a limit must not run without one.
func Start(settings Settings, directories []string) (*Manager, error) {
	if !settings.Enabled {
		return nil, nil
	}
	if openLibrary == nil {
		return nil, ErrUnsupported
	}
	path, err := findLibrary(directories)
	if err != nil {
		return nil, err
	}
	library, err := openLibrary(path)
	if err != nil {
		return nil, err
	}
	return Open(settings, library, os.Getenv(LedgerVariable))
}

// Open is Start with a library at hand, and the ledger's path ("" for the user's own).
func Open(settings Settings, library Library, path string) (*Manager, error) {
	group, err := newGroup()
	if err != nil {
		return nil, err
	}
	ledger, err := library.OpenLedger(path)
	if err != nil {
		return nil, fmt.Errorf("cannot open the ledger of models' memory: %w", err)
	}
	return &Manager{
		settings: settings,
		library:  library,
		group:    group,
		ledger:   ledger,
		caches:   map[int]*KVCache{},
		names:    map[string]string{},
	}, nil
}

// newGroup makes the name under which this server's models share a limit, at most 31 bytes. The process id alone would be
// shared by servers in containers of one user with one /dev/shm, where each of them is process 1.
func newGroup() (string, error) {
	var suffix [4]byte
	if _, err := rand.Read(suffix[:]); err != nil {
		return "", fmt.Errorf("kvcached: no random number for the name of this server's group: %w", err)
	}
	return fmt.Sprintf("ollama-%d-%s", os.Getpid(), hex.EncodeToString(suffix[:])), nil
}

// Settings are those the manager was opened with.
func (m *Manager) Settings() Settings { return m.settings }

// Describe says in one line what is managed, for the log.
func (m *Manager) Describe() string {
	limit := "none"
	if m.settings.Limit != NoLimit {
		limit = fmt.Sprintf("%s (%s)", FormatSize(m.settings.Limit), m.settings.Source)
	}
	return fmt.Sprintf("libkvcached %s, ledger %s, group %s, limit %s", m.library.Version(), m.ledger.Path(), m.group, limit)
}

// SetName records what the user calls the model stored in a file; reports and errors use it.
func (m *Manager) SetName(model, name string) {
	if model == "" || name == "" {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names[model] = name
}

// Name is the name recorded for a model's file, else the last part of its path.
func (m *Manager) Name(model string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if name := m.names[model]; name != "" {
		return name
	}
	return model[strings.LastIndexByte(model, '/')+1:]
}

// NewKVCache is a cache for a child that will run the model stored in a file. It holds nothing until Allocate.
func (m *Manager) NewKVCache(model string, need Need) *KVCache {
	return &KVCache{manager: m, model: model, name: m.Name(model), need: need, slot: noSlot}
}

// BySlot is the cache that holds the lease of a slot, nil if there is none.
func (m *Manager) BySlot(slot int) *KVCache {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.caches[slot]
}

// Check says whether a model with this need could get its lease now: nil, or the *LimitError that Allocate would return.
// Another process may change the answer before Allocate is called.
func (m *Manager) Check(model string, need Need) error {
	if m.settings.Limit == NoLimit {
		return nil
	}
	charges, err := m.charges()
	if err != nil {
		return err
	}
	refusal := m.refusal(m.Name(model), need, charges)
	if refusal.Charged() <= m.settings.Limit && need.Total() <= m.settings.Limit-refusal.Charged() {
		return nil
	}
	return refusal
}

// charges lists what the group's slots are charged, largest first.
func (m *Manager) charges() ([]Charge, error) {
	slots, err := m.ledger.Slots()
	if err != nil {
		return nil, err
	}
	var charges []Charge
	for _, slot := range slots {
		if slot.Group == m.group {
			charges = append(charges, Charge{Model: slot.Name, Bytes: slot.Charge})
		}
	}
	slices.SortStableFunc(charges, func(a, b Charge) int {
		switch {
		case a.Bytes > b.Bytes:
			return -1
		case a.Bytes < b.Bytes:
			return 1
		}
		return strings.Compare(a.Model, b.Model)
	})
	return charges, nil
}

func (m *Manager) refusal(name string, need Need, charges []Charge) *LimitError {
	return &LimitError{Model: name, Need: need, Limit: m.settings.Limit, Source: m.settings.Source, Others: charges}
}

// States of a model in reports.
const (
	StateLeased = "leased" // memory is set aside; the child has not opened its slot, and need not if it keeps no KV cache
	StateAwake  = "awake"  // the child runs on its slot
)

// Stats is what one model occupies. Sizes are bytes.
type Stats struct {
	Model    string // its file
	Name     string
	State    string
	PID      int64
	Mapped   uint64 // KV cache that is there; weights and compute buffers are not in it
	Reserved uint64 // KV cache that could be
	Lease    uint64
	Charge   uint64 // what counts against the limit
	Limit    uint64 // NoLimit for none
}

// Stats lists the models of this server that hold a lease, in no particular order. The ledger is read once.
func (m *Manager) Stats() ([]Stats, error) {
	slots, err := m.ledger.Slots()
	if err != nil {
		return nil, err
	}
	var stats []Stats
	for _, slot := range slots {
		cache := m.BySlot(slot.Index)
		if cache == nil || slot.Group != m.group {
			continue
		}
		state := StateLeased
		if slot.Attached {
			state = StateAwake
		}
		// Weights and compute buffers are mapped in full: this server puts no model to sleep.
		reserved := slot.Reserved - min(slot.Reserved, slot.Weights+slot.Compute)
		stats = append(stats, Stats{
			Model: cache.model, Name: cache.name, State: state, PID: slot.PID,
			Mapped: slot.KV, Reserved: reserved, Lease: slot.Lease, Charge: slot.Charge, Limit: m.settings.Limit,
		})
	}
	return stats, nil
}

// Charge is what one model counts against the limit.
type Charge struct {
	Model string
	Bytes uint64
}

// LimitError refuses a model that the limit has no room for. Nothing was started or changed.
type LimitError struct {
	Model  string
	Need   Need
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

// Error must not contain words that Ollama takes for a crash of the device: it would unload every model in reply.
func (e *LimitError) Error() string {
	var text strings.Builder
	fmt.Fprintf(&text, "kvcached: model %s needs %s (weights %s, first KV step %s), but the limit for all models together is %s, set by %s",
		e.Model, FormatSize(e.Need.Total()), FormatSize(e.Need.Weights), FormatSize(e.Need.FirstStep), FormatSize(e.Limit), e.Source)
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
