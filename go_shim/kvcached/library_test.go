package kvcached

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// These tests need the generated cgo file in the package and what KVCACHED_TEST_DIR holds: libkvcached.so, other-abi.so
// (kvcached_abi_version says 99) and child (opens the slot it is given). tests/go/test_go_shim.py makes all of it.
func realLibrary(t *testing.T) string {
	t.Helper()
	directory := os.Getenv("KVCACHED_TEST_DIR")
	if openLibrary == nil || directory == "" {
		t.Skip("no generated glue here, or KVCACHED_TEST_DIR is not set: see tests/go/test_go_shim.py")
	}
	return directory
}

func realManager(t *testing.T, limit uint64) (*Manager, string) {
	t.Helper()
	directory := realLibrary(t)
	ledger := filepath.Join(t.TempDir(), "ledger")
	t.Setenv(LedgerVariable, ledger)
	manager, err := Start(Settings{Enabled: true, Limit: limit, Source: MemoryVariable}, []string{directory})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(manager.Close)
	return manager, ledger
}

func TestRealLibraryLeases(t *testing.T) {
	manager, path := realManager(t, 1_000_000)
	if text := manager.Describe(); !strings.Contains(text, path) || !strings.Contains(text, "limit 1 MB (OLLAMA_KVCACHED_MEMORY_GB)") {
		t.Errorf("%q", text)
	}

	first := manager.NewKVCache("/m/first", Need{Weights: 600_000})
	if err := first.Allocate(700_000); err != nil {
		t.Fatal(err)
	}
	stats, err := manager.Stats()
	if err != nil || len(stats) != 1 || stats[0].State != StateLeased || stats[0].Charge != 700_000 || stats[0].Lease != 700_000 || stats[0].Mapped != 0 {
		t.Errorf("%+v, %v", stats, err)
	}

	second := manager.NewKVCache("/m/second", Need{Weights: 300_001})
	var refusal *LimitError
	if err := second.Allocate(300_001); !errors.As(err, &refusal) || refusal.Charged() != 700_000 || refusal.Others[0].Model != "first" {
		t.Errorf("%v", err)
	}
	first.Free()
	if err := second.Allocate(300_001); err != nil {
		t.Error(err)
	}

	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("ledger: %v, %v", info, err)
	}
}

func TestRealLibraryManyLeases(t *testing.T) {
	manager, _ := realManager(t, NoLimit)
	var err error
	taken := 0
	for ; taken < 4096; taken++ {
		if err = manager.NewKVCache(strings.Repeat("long name ", 20), Need{}).Allocate(1); err != nil {
			break
		}
	}
	if !errors.Is(err, &LibraryError{Name: "KVCACHED_E_FULL"}) {
		t.Errorf("after %d leases: %v", taken, err)
	}
	stats, statsErr := manager.Stats()
	if statsErr != nil || len(stats) != taken || taken == 0 {
		t.Errorf("%d leases, %d listed, %v", taken, len(stats), statsErr)
	}
	if len(stats) > 0 && len(stats[0].Name) > 200 {
		t.Errorf("name: %q", stats[0].Name)
	}
}

// realChild is a process that maps memory in the slot it is given.
type realChild struct {
	t       *testing.T
	command *exec.Cmd
	input   io.Writer
	output  *bufio.Reader
}

// startChild starts it and waits until it has mapped so many bytes of KV, weights and compute buffers.
func startChild(t *testing.T, cache *KVCache, kv, weights, compute int) *realChild {
	t.Helper()
	child := exec.Command(filepath.Join(os.Getenv("KVCACHED_TEST_DIR"), "child"), fmt.Sprint(kv), fmt.Sprint(weights), fmt.Sprint(compute))
	child.Env = os.Environ()
	for name, value := range cache.Env() {
		child.Env = append(child.Env, name+"="+value)
	}
	child.Stderr = os.Stderr
	input, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	c := &realChild{t: t, command: child, input: input, output: bufio.NewReader(output)}
	t.Cleanup(c.kill)
	if line := c.hear(); line != fmt.Sprintf("mapped %d %d %d", kv, weights, compute) {
		t.Fatalf("child: %q", line)
	}
	return c
}

func (c *realChild) tell(line string) {
	if _, err := io.WriteString(c.input, line+"\n"); err != nil {
		c.t.Error(err)
	}
}

func (c *realChild) hear() string {
	line, err := c.output.ReadString('\n')
	if err != nil {
		c.t.Error(err)
	}
	return strings.TrimSpace(line)
}

func (c *realChild) ask(line string) string {
	c.tell(line)
	return c.hear()
}

func (c *realChild) kill() {
	_ = c.command.Process.Kill()
	_ = c.command.Wait()
}

// realModel admits a model and has a child of it map a million bytes.
func realModel(t *testing.T, m *Manager, name string) (*KVCache, *realChild) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cache, err := m.Admit(ctx, Request{Model: "/m/" + name, Name: name, Need: Need{Weights: 700416, FirstStep: 299008}, Whole: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cache.Free)
	child := startChild(t, cache, 299008, 700416, 0)
	cache.Begin()
	cache.End()
	return cache, child
}

// until waits for a state.
func until(t *testing.T, c *KVCache, state string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); c.State() != state; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s is %s, not %s", c.name, c.State(), state)
		}
	}
}

func TestRealLibrarySleepsAndWakes(t *testing.T) {
	manager, _ := realManager(t, 2_500_000)
	a, first := realModel(t, manager, "a")
	b, second := realModel(t, manager, "b")

	// The third has no room until the one that was used longest ago sleeps.
	if answer := second.ask("check"); answer != "intact" {
		t.Error(answer)
	}
	c, third := realModel(t, manager, "c")
	until(t, a, StateAsleep)
	if b.State() != StateAwake || !a.CanSleep() {
		t.Errorf("b is %s", b.State())
	}

	// And back, in turn.
	time.Sleep(awakeAtLeast)
	for _, model := range []struct {
		cache *KVCache
		child *realChild
	}{{a, first}, {b, second}, {c, third}, {a, first}} {
		model.cache.Begin()
		if err := model.cache.Awake(t.Context()); err != nil {
			t.Fatal(err)
		}
		if answer := model.child.ask("check"); answer != "intact" {
			t.Errorf("%s: %s", model.cache.name, answer)
		}
		model.cache.End()
	}

	// The keep-alive timer.
	a.Sleep()
	until(t, a, StateAsleep)
	stats, err := manager.Stats()
	if err != nil || stats[0].Name != "a" || stats[0].Host < 999_424 || stats[0].Charge != 0 || stats[0].Mapped != 0 || stats[0].Reserved != 1<<30 {
		t.Errorf("%+v, %v", stats, err)
	}
	a.Free()
	first.kill()
	if _, err := manager.Stats(); err != nil {
		t.Error(err)
	}
}

// A claim that does not fit waits in the child until others sleep; of two that wait for each other the first goes on.
func TestRealLibraryParks(t *testing.T) {
	manager, _ := realManager(t, 2_500_000)
	a, first := realModel(t, manager, "a")
	b, second := realModel(t, manager, "b")

	a.Begin()
	if answer := first.ask("grow 1048576"); answer != "grown 1347584" {
		t.Error(answer)
	}
	until(t, b, StateAsleep)

	b.Begin()
	waits := make(chan error, 1)
	go func() { waits <- b.Awake(t.Context()) }()
	until(t, b, StateWaking)
	a.End()
	if err := <-waits; err != nil {
		t.Fatal(err)
	}
	until(t, a, StateAsleep)
	if answer := second.ask("check"); answer != "intact" {
		t.Error(answer)
	}
	b.End()

	// Both in use, each lacking room for its next step.
	time.Sleep(awakeAtLeast)
	c, third := realModel(t, manager, "c")
	b.Begin()
	if err := b.Awake(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Begin()
	if err := c.Awake(t.Context()); err != nil {
		t.Fatal(err)
	}
	second.tell("grow 1048576")
	third.tell("grow 1048576")
	if answer := second.hear(); answer != "grown 1347584" {
		t.Error(answer)
	}
	b.End()
	if answer := third.hear(); answer != "grown 1347584" {
		t.Error(answer)
	}
	if answer := third.ask("check"); answer != "intact" {
		t.Error(answer)
	}
	c.End()

	// More than the limit alone fails at once, and with a reason.
	c.Begin()
	if answer := third.ask("grow 2097152"); !strings.HasPrefix(answer, "failed ") || !strings.Contains(answer, "limit") {
		t.Error(answer)
	}
	c.End()
}

// A limit set by another process holds, and is shown.
func TestRealLibraryLimitSetByOthers(t *testing.T) {
	manager, path := realManager(t, 2_500_000)
	a, _ := realModel(t, manager, "a")
	b, _ := realModel(t, manager, "b")
	other, err := manager.library.OpenLedger(path)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Millisecond)
	if limit, err := other.SetLimit(manager.Group(), 1_228_800); err != nil || limit.Bytes != 1_228_800 || limit.Revision != 2 {
		// the first was this server's own
		t.Errorf("%+v, %v", limit, err)
	}
	until(t, a, StateAsleep)
	if stats, err := manager.Stats(); err != nil || stats[1].Limit != 1_228_800 || b.State() != StateAwake {
		t.Errorf("%+v, %v", stats, err)
	}
	if limit, err := other.Limit(""); err != nil || limit.Revision != 0 || limit.Bytes != NoLimit {
		t.Errorf("%+v, %v", limit, err)
	}
}

func TestRealLibraryPathsAndClock(t *testing.T) {
	manager, _ := realManager(t, NoLimit)
	path, err := manager.library.LedgerPath("GPU-01234567-89ab-cdef-0123-456789abcdef")
	if err != nil || !strings.HasSuffix(path, "01234567-89ab-cdef-0123-456789abcdef") || !strings.Contains(path, fmt.Sprint(os.Getuid())) {
		t.Errorf("%q, %v", path, err)
	}
	if _, err := manager.library.LedgerPath("no such name"); !errors.Is(err, &LibraryError{Name: "KVCACHED_E_INVAL"}) {
		t.Errorf("%v", err)
	}
	before := manager.library.Monotonic()
	time.Sleep(20 * time.Millisecond)
	if passed := manager.library.Monotonic() - before; passed < 20*time.Millisecond || passed > 10*time.Second {
		t.Errorf("%v", passed)
	}
	if _, err := manager.host.ledger.Command(3, CommandSleep, time.Second); !errors.Is(err, ErrSlot) {
		t.Errorf("%v", err)
	}
	start := time.Now()
	if seen, err := manager.host.ledger.Wait(0, 50*time.Millisecond); err != nil || seen == 0 && time.Since(start) < 50*time.Millisecond {
		t.Errorf("%d, %v after %v", seen, err, time.Since(start))
	}
}

func TestRealLibraryChild(t *testing.T) {
	// Room for everything once: weights that the child maps itself must not count twice.
	manager, _ := realManager(t, 1_060_000)
	need := Need{Weights: 1_000_000, FirstStep: 4096, Outside: 300_000}
	cache := manager.NewKVCache("/m/model", need)
	if err := cache.Allocate(int(need.Total())); err != nil {
		t.Fatal(err)
	}

	child := startChild(t, cache, 40960, 700416, 8192)

	stats, err := manager.Stats()
	want := Stats{
		Model: "/m/model", Name: "model", State: StateLoading, PID: int64(child.command.Process.Pid),
		Mapped: 40960, Reserved: 1 << 30, Weights: 700_416, Lease: 1_004_096, Charge: 300_000 + 40960 + 700_416 + 8192, Limit: 1_060_000,
	}
	if err != nil || len(stats) != 1 || stats[0] != want {
		t.Errorf("%+v, %v; want %+v", stats, err, want)
	}

	// The child's end and the lease's make the slot free, whichever way the child ended.
	child.kill()
	cache.Free()
	if slots, err := manager.host.ledger.Slots(); err != nil || len(slots) != 0 {
		t.Errorf("%+v, %v", slots, err)
	}
}

func TestRealLibraryRefusesAForeignFile(t *testing.T) {
	directory := realLibrary(t)
	path := filepath.Join(t.TempDir(), "ledger")
	if err := os.WriteFile(path, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(LedgerVariable, path)
	_, err := Start(Settings{Enabled: true, Limit: NoLimit}, []string{directory})
	if !errors.Is(err, &LibraryError{Name: "KVCACHED_E_LEDGER"}) || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
	if data, _ := os.ReadFile(path); string(data) != "something else" {
		t.Errorf("the file was changed: %q", data)
	}
}

func TestRealLibraryOfAnotherABI(t *testing.T) {
	other := filepath.Join(realLibrary(t), "other-abi.so")
	_, err := openLibrary(other)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%s has ABI 99, but this ollama was built for ABI ", other)) {
		t.Errorf("%v", err)
	}
}

func TestRealLibraryThatIsNone(t *testing.T) {
	realLibrary(t)
	path := filepath.Join(t.TempDir(), LibraryName)
	if err := os.WriteFile(path, []byte("not a library"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openLibrary(path); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "cannot be loaded (") {
		t.Errorf("%v", err)
	}
}
