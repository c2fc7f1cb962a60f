package kvcached

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
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

func TestRealLibraryChild(t *testing.T) {
	// Room for everything once: weights that the child maps itself must not count twice.
	manager, _ := realManager(t, 1_060_000)
	need := Need{Weights: 1_000_000, FirstStep: 4096, Outside: 300_000}
	cache := manager.NewKVCache("/m/model", need)
	if err := cache.Allocate(int(need.Total())); err != nil {
		t.Fatal(err)
	}

	child := exec.Command(filepath.Join(os.Getenv("KVCACHED_TEST_DIR"), "child"), "40960", "700416", "8192")
	child.Env = os.Environ()
	for name, value := range cache.Env() {
		child.Env = append(child.Env, name+"="+value)
	}
	child.Stderr = os.Stderr
	output, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "mapped 40960 700416 8192\n" {
		t.Fatalf("child: %q, %v", line, err)
	}

	stats, err := manager.Stats()
	want := Stats{
		Model: "/m/model", Name: "model", State: StateLoading, PID: int64(child.Process.Pid),
		Mapped: 40960, Reserved: 1 << 30, Weights: 700_416, Lease: 1_004_096, Charge: 300_000 + 40960 + 700_416 + 8192, Limit: 1_060_000,
	}
	if err != nil || len(stats) != 1 || stats[0] != want {
		t.Errorf("%+v, %v; want %+v", stats, err, want)
	}

	// The child's end and the lease's make the slot free, whichever way the child ended.
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
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
