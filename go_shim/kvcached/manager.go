package kvcached

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// LedgerVariable names the ledger to use instead of the user's own. The server hands its ledger to its children in it.
const LedgerVariable = "KVCACHED_LEDGER"

// defaultRoomWait is how long a child's claim waits for room: Ollama's own OLLAMA_LOAD_TIMEOUT.
const defaultRoomWait = 5 * time.Minute

// Manager is the budget of one server: its devices, its limit, and the caches of its children. It alone decides which of
// them gives way.
type Manager struct {
	settings Settings
	tuning   tuning
	library  Library
	group    string
	named    string // ledger that LedgerVariable named, "" for none
	policy   Policy
	host     *pool

	service     *Client // nil where the settings name no socket
	stopService func()

	opening sync.Mutex     // one ledger is opened at a time; taken before mu
	closed  chan struct{}  // closed by Close
	running sync.WaitGroup // goroutines

	mu       sync.Mutex
	over     bool // Close was called
	pools    []*pool
	caches   map[*KVCache]struct{} // those that hold a lease
	names    map[string]string     // model file: the name its user knows
	unloader func(model string) bool
	roomWait time.Duration
	commands uint64 // commands that came back: what was read of a ledger before is old
	serial   uint64 // of demands
}

// tuning is the part of the settings that decisions read.
type tuning struct {
	idle   time.Duration // sleep after so long without a request; 0: only under pressure
	asleep time.Duration // unload after so long asleep
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
	policy, err := policyNamed(settings.Policy)
	if err != nil {
		return nil, err
	}
	group, err := newGroup()
	if err != nil {
		return nil, err
	}
	ledger, err := library.OpenLedger(path)
	if err != nil {
		return nil, fmt.Errorf("cannot open the ledger of models' memory: %w", err)
	}
	m := &Manager{
		settings: settings,
		tuning:   tuning{idle: settings.Idle, asleep: settings.Sleep},
		library:  library,
		group:    group,
		named:    path,
		policy:   policy,
		closed:   make(chan struct{}),
		caches:   map[*KVCache]struct{}{},
		names:    map[string]string{},
		roomWait: defaultRoomWait,
	}
	m.host = m.newPool(Device{ID: HostID, Name: "CPU"}, ledger)
	m.host.limit, m.host.source = settings.Limit, settings.Source
	m.pools = []*pool{m.host}
	m.mu.Lock()
	m.startPool(m.host)
	m.mu.Unlock()
	m.followService()
	return m, nil
}

// Close ends the manager's goroutines, and every wait with an error. Leases stay until their caches are freed.
func (m *Manager) Close() {
	m.mu.Lock()
	if m.over {
		m.mu.Unlock()
		return
	}
	m.over = true
	close(m.closed)
	for _, p := range m.pools {
		for _, d := range slices.Clone(p.queue) {
			d.finish(errClosed)
		}
	}
	m.mu.Unlock()
	if m.service != nil {
		m.stopService()
	}
	m.running.Wait()
	if m.service != nil {
		m.service.Close()
	}
}

// spawn runs f on a goroutine that Close waits for. Held: mu.
func (m *Manager) spawn(f func()) {
	if m.over {
		return
	}
	m.running.Add(1)
	go func() {
		defer m.running.Done()
		f()
	}()
}

// kick has all pools decide anew. Not held: mu.
func (m *Manager) kick() {
	m.mu.Lock()
	pools := m.pools
	m.mu.Unlock()
	for _, p := range pools {
		p.kick()
	}
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

// Group is the name under which this server's models share a limit in the ledgers.
func (m *Manager) Group() string { return m.group }

// OnUnload sets the scheduler's way to unload a model that sleeps: it starts to, and returns at once; false when the model
// is in use. It is called with no lock held.
func (m *Manager) OnUnload(unload func(model string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unloader = unload
}

// SetRoomWait says how long a child's claim may wait for room: as long as the server lets a model load. Without a bound, which
// is 0 or less as in Ollama's settings, it waits for weeks.
func (m *Manager) SetRoomWait(wait time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if wait <= 0 {
		wait = math.MaxInt64
	}
	m.roomWait = wait
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

// NewKVCache is a cache for a child that will run the model stored in a file, in host memory. It holds nothing until
// Allocate.
func (m *Manager) NewKVCache(model string, need Need) *KVCache {
	return &KVCache{
		manager: m, model: model, name: m.Name(model), need: need,
		shares: []share{{pool: m.host, need: need, main: true, size: need.Total()}},
	}
}

// ByModel is the cache that holds the lease of a model's child, nil if there is none.
func (m *Manager) ByModel(model string) *KVCache {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.caches {
		if c.model == model {
			return c
		}
	}
	return nil
}
