package kvcached

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestAllocateAndFree(t *testing.T) {
	manager, ledger := fakeManager(t, 1000)
	cache := manager.NewKVCache("/models/sha256-abc", Need{Weights: 600, FirstStep: 100, Outside: 450})

	if env := cache.Env(); len(env) != 0 {
		t.Errorf("environment without a lease: %v", env)
	}
	if err := cache.Allocate(700); err != nil {
		t.Fatal(err)
	}
	if got := ledger.slots[0]; got.Lease != 700 || got.Fixed != 450 || got.Name != "sha256-abc" || got.Group != manager.group {
		t.Errorf("slot: %+v", got)
	}
	want := map[string]string{
		"OLLAMA_KVCACHED_ENABLED": "true",
		"KVCACHED_LEDGER":         "/dev/shm/fake",
		"KVCACHED_SLOT":           "0",
		"KVCACHED_GROUP":          manager.group,
		"KVCACHED_LIMIT":          "1000",
		"KVCACHED_LEASES":         "host,0,1000,/dev/shm/fake",
		"KVCACHED_SLEEPS":         "1",
		"KVCACHED_ROOM_WAIT_MS":   "300000",
	}
	if got := cache.Env(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("environment: %v, want %v", got, want)
	}
	if manager.ByModel("/models/sha256-abc") != cache || !cache.Whole() {
		t.Error("the model does not lead to its cache")
	}
	if err := cache.Allocate(1); err == nil || !strings.Contains(err.Error(), "already holds") {
		t.Errorf("second lease: %v", err)
	}

	cache.Free()
	cache.Free()
	if len(ledger.slots) != 0 || manager.ByModel("/models/sha256-abc") != nil || cache.Whole() || cache.Slot() != -1 {
		t.Errorf("after free: %+v", ledger.slots)
	}
	if err := cache.Allocate(1000); err != nil {
		t.Errorf("lease after free: %v", err)
	}
}

// Two servers may have one process id, in containers that share a ledger; their models must not share a limit.
func TestGroupsAreApart(t *testing.T) {
	first, ledger := fakeManager(t, 10)
	second, err := Open(Settings{Enabled: true, Limit: 10}, &fakeLibrary{ledger: ledger}, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFake(second, ledger) })
	for _, manager := range []*Manager{first, second} {
		if !strings.HasPrefix(manager.group, fmt.Sprintf("ollama-%d-", os.Getpid())) || len(manager.group) > 31 {
			t.Errorf("group %q", manager.group)
		}
		if err := manager.NewKVCache("m", Need{}).Allocate(10); err != nil {
			t.Error(err)
		}
	}
	if len(ledger.slots) != 2 {
		t.Errorf("%+v", ledger.slots)
	}
}

func TestAllocateRefusesNonsense(t *testing.T) {
	manager, ledger := fakeManager(t, NoLimit)
	for _, size := range []int{0, -1} {
		if err := manager.NewKVCache("m", Need{}).Allocate(size); err == nil || !strings.Contains(err.Error(), "positive") {
			t.Errorf("size %d: %v", size, err)
		}
	}
	if len(ledger.slots) != 0 {
		t.Errorf("slots taken: %+v", ledger.slots)
	}
}

func TestAllocateOverTheLimit(t *testing.T) {
	manager, ledger := fakeManager(t, 2_000_000_000)
	manager.SetName("/m/big", "big:7b")
	manager.SetName("/m/small", "small:1b")

	// Alone.
	need := Need{Weights: 4_000_000_000, FirstStep: 360_000_000}
	err := manager.NewKVCache("/m/big", need).Allocate(int(need.Total()))
	var refusal *LimitError
	if !errors.As(err, &refusal) {
		t.Fatalf("no LimitError: %v", err)
	}
	if refusal.Model != "big:7b" || refusal.Need != need || refusal.Limit != 2e9 || refusal.Source != MemoryVariable || len(refusal.Others) != 0 || refusal.FitsAlone() {
		t.Errorf("%+v", refusal)
	}
	for _, want := range []string{"big:7b needs 4.36 GB (weights 4 GB, first KV step 360 MB)", "2 GB, set by OLLAMA_KVCACHED_MEMORY_GB", "raise the limit to 4.36 GB or more"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}

	// Beside others; another server's models do not count.
	small := manager.NewKVCache("/m/small", Need{Weights: 1_200_000_000})
	if err := small.Allocate(1_200_000_000); err != nil {
		t.Fatal(err)
	}
	ledger.add(Slot{Index: 9, Group: "ollama-1", Name: "foreign", Charge: 1 << 40})
	ledger.set(small.Slot(), func(s *Slot) { s.Charge = 1_500_000_000 }) // it has grown
	err = manager.NewKVCache("/m/big", Need{Weights: 700_000_000}).Allocate(700_000_000)
	if !errors.As(err, &refusal) || !refusal.FitsAlone() || refusal.Charged() != 1_500_000_000 {
		t.Fatalf("%v", err)
	}
	for _, want := range []string{"charged 1.5 GB of it (small:1b 1.5 GB)", "ollama stop small:1b", "raise the limit to 2.2 GB or more"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
	if len(ledger.slots) != 2 {
		t.Errorf("a refused model left a slot: %+v", ledger.slots)
	}
}

// Ollama unloads every model when an error looks like an exhausted device (llm/status.go). Ours must not.
func TestErrorsAreNotTakenForADeviceFailure(t *testing.T) {
	suspicious := []string{"out of memory", "out of device memory", "malloc failed", "failed to allocate", "allocation failed", "not enough memory", "insufficient memory", "failed to load model"}
	alone := &LimitError{Model: "m", Need: Need{Weights: 10, FirstStep: 5}, Limit: 9, Source: "s"}
	beside := &LimitError{Model: "m", Need: Need{Weights: 4, FirstStep: 2}, Limit: 9, Source: "s", Others: []Charge{{"n", 5}}}
	gone := &LimitError{Model: "m", Need: Need{Weights: 4, FirstStep: 2}, Limit: 9, Source: "s"}
	for _, err := range []error{alone, beside, gone, ErrUnsupported, ErrLimit} {
		for _, word := range suspicious {
			if strings.Contains(strings.ToLower(err.Error()), word) {
				t.Errorf("%q contains %q", err, word)
			}
		}
	}
	if !strings.Contains(gone.Error(), "try again") {
		t.Errorf("%q", gone)
	}
}

func TestStats(t *testing.T) {
	manager, ledger := fakeManager(t, 1000)
	manager.SetName("/m/a", "a:latest")
	cache := manager.NewKVCache("/m/a", Need{Weights: 100, FirstStep: 20})
	if err := cache.Allocate(120); err != nil {
		t.Fatal(err)
	}
	ledger.add(Slot{Index: 5, Group: "ollama-1", Name: "foreign"})

	stats, err := manager.Stats()
	if want := (Stats{Model: "/m/a", Name: "a:latest", State: StateLeased, Lease: 120, Charge: 120, Limit: 1000}); err != nil || len(stats) != 1 || stats[0] != want {
		t.Errorf("%+v, %v; want %+v", stats, err, want)
	}
	ledger.set(cache.Slot(), func(s *Slot) {
		s.Attached, s.PID, s.Charge = true, 42, 150
		s.Claim, s.Reserved, s.KindReserved = 90, 440, [3]uint64{400, 30, 10}
		s.KV, s.Weights, s.Compute, s.Context, s.HostBytes = 50, 30, 10, 7, 8
	})
	cache.Begin()
	stats, err = manager.Stats()
	if want := (Stats{"/m/a", "a:latest", StateAwake, 42, 50, 400, 30, 7, 8, 0, false, 120, 150, 1000}); err != nil || len(stats) != 1 || stats[0] != want {
		t.Errorf("%+v, %v; want %+v", stats, err, want)
	}
	ledger.breakWith(errors.New("torn"))
	if _, err := manager.Stats(); err == nil {
		t.Error("a ledger that cannot be read passes unnoticed")
	}
}

func TestLedgerFailures(t *testing.T) {
	full := &LibraryError{Code: -7, Name: "KVCACHED_E_FULL", Text: "the ledger has no free slot", Detail: "64 of 64"}
	manager, ledger := fakeManager(t, NoLimit)
	ledger.breakWith(full)
	err := manager.NewKVCache("m", Need{}).Allocate(1)
	if !errors.Is(err, full) || !strings.Contains(err.Error(), "64 of 64") {
		t.Errorf("%v", err)
	}
	var refusal *LimitError
	if errors.As(err, &refusal) {
		t.Error("taken for the limit")
	}

	if _, err := Open(Settings{Enabled: true}, &fakeLibrary{fail: full}, ""); !errors.Is(err, full) {
		t.Errorf("open: %v", err)
	}
}

func TestFreeSurvivesALostLedger(t *testing.T) {
	manager, ledger := fakeManager(t, NoLimit)
	cache := manager.NewKVCache("m", Need{})
	if err := cache.Allocate(1); err != nil {
		t.Fatal(err)
	}
	ledger.breakWith(errors.New("gone"))
	cache.Free()
	if cache.Slot() != -1 || manager.ByModel("m") != nil {
		t.Error("the cache still believes in its lease")
	}
}

func TestStart(t *testing.T) {
	defer func(open func(string) (Library, error)) { openLibrary = open }(openLibrary)
	directory := t.TempDir()
	opened := ""
	openLibrary = func(path string) (Library, error) {
		opened = path
		return &fakeLibrary{ledger: newFakeLedger("/dev/shm/fake")}, nil
	}

	if manager, err := Start(Settings{}, []string{directory}); manager != nil || err != nil || opened != "" {
		t.Errorf("disabled: %v, %v, opened %q", manager, err, opened)
	}

	_, err := Start(Settings{Enabled: true}, []string{"", directory, "/nonexistent"})
	if err == nil || !strings.Contains(err.Error(), filepath.Join(directory, LibraryName)+", /nonexistent/"+LibraryName) || !strings.Contains(err.Error(), "OLLAMA_KVCACHED_ENABLED=false") {
		t.Errorf("no library: %v", err)
	}

	path := filepath.Join(directory, LibraryName)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	manager, err := Start(Settings{Enabled: true, Limit: NoLimit}, []string{"/nonexistent", directory})
	if manager != nil {
		t.Cleanup(manager.Close)
	}
	if err != nil || opened != path {
		t.Fatalf("%v, opened %q", err, opened)
	}
	if text := manager.Describe(); !strings.Contains(text, "limit none") || !strings.Contains(text, "/dev/shm/fake") {
		t.Errorf("%q", text)
	}
	SetDefault(manager)
	if Default() != manager {
		t.Error("default is not what was set")
	}
	SetDefault(nil)

	openLibrary = nil
	if _, err := Start(Settings{Enabled: true}, []string{directory}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("no glue: %v", err)
	}
	if _, err := Start(Settings{}, nil); err != nil {
		t.Errorf("no glue, disabled: %v", err)
	}
}

func TestConcurrentLeasesKeepTheLimit(t *testing.T) {
	manager, ledger := fakeManager(t, 10)
	var group sync.WaitGroup
	for i := range 8 {
		group.Add(1)
		go func() {
			defer group.Done()
			cache := manager.NewKVCache(fmt.Sprint("m", i), Need{})
			for range 200 {
				if err := cache.Allocate(3); err != nil {
					var refusal *LimitError
					if !errors.As(err, &refusal) {
						t.Error(err)
					}
					continue
				}
				if manager.ByModel(cache.Model()) != cache {
					t.Error("the model has another cache")
				}
				if slots, _ := ledger.Slots(); len(slots) > 3 {
					t.Errorf("%d leases of 3 under a limit of 10", len(slots))
				}
				_, _ = manager.Stats()
				cache.Free()
			}
		}()
	}
	group.Wait()
	if len(ledger.slots) != 0 {
		t.Errorf("left: %+v", ledger.slots)
	}
}
