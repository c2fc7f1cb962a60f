package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/envconfig"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
	"github.com/ollama/ollama/ml"
)

// budget is a library with one ledger in memory.
type budget struct {
	mu    sync.Mutex
	slots []kvcached.Slot
}

func (b *budget) Version() string                            { return "test" }
func (b *budget) OpenLedger(string) (kvcached.Ledger, error) { return b, nil }
func (b *budget) Path() string                               { return "test" }

func (b *budget) Slots() ([]kvcached.Slot, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.slots), nil
}

func (b *budget) Unlease(slot int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.slots = slices.DeleteFunc(b.slots, func(s kvcached.Slot) bool { return s.Index == slot })
	return nil
}

func (b *budget) Lease(group, name string, size, fixed, limit uint64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var sum uint64
	for _, slot := range b.slots {
		sum += slot.Charge
	}
	if sum+size > limit {
		return -1, &kvcached.LibraryError{Code: -3, Name: "KVCACHED_E_LIMIT"}
	}
	index := 0
	for slices.ContainsFunc(b.slots, func(s kvcached.Slot) bool { return s.Index == index }) {
		index++
	}
	b.slots = append(b.slots, kvcached.Slot{Index: index, Name: name, Group: group, Lease: size, Fixed: fixed, Charge: size})
	return index, nil
}

// leasing is a runner whose lease ends with it, as a process's does.
type leasing struct {
	*mockLlm
	cache *kvcached.KVCache
}

func (l *leasing) Close() error {
	l.cache.Free()
	return l.mockLlm.Close()
}

// kvcachedScheduler runs under a limit of as many models of the size of one file as are given; its runners lease what
// the real ones would.
func kvcachedScheduler(t *testing.T, ctx context.Context, models float64) (*Scheduler, *kvcached.Manager) {
	t.Helper()
	path, f := kvcachedModel(t)
	one := llm.KVCachedNeed(llm.KVCachedLoad{ModelPath: path, GGML: f}).Total()
	manager, err := kvcached.Open(kvcached.Settings{Enabled: true, Limit: uint64(models * float64(one)), Source: "a test"}, &budget{}, "")
	if err != nil {
		t.Fatal(err)
	}
	kvcached.SetDefault(manager)
	t.Cleanup(func() { kvcached.SetDefault(nil) })

	s := InitScheduler(ctx)
	s.waitForRecovery = 10 * time.Millisecond
	s.getGpuFn = func(context.Context, []ml.FilteredRunnerDiscovery) []ml.DeviceInfo { return nil }
	s.getSystemInfoFn = getSystemInfoFn
	s.newServerFn = func(_ ml.SystemInfo, _ []ml.DeviceInfo, model string, f *ggml.GGML, adapters []string, projectors []string, _ api.Options, _ int, config llm.LlamaServerConfig) (llm.LlamaServer, error) {
		need := llm.KVCachedNeed(llm.KVCachedLoad{ModelPath: model, GGML: f, Adapters: adapters, Projectors: projectors, Draft: config.DraftModelPath, KVCacheType: envconfig.KvCacheType()})
		cache := manager.NewKVCache(model, need)
		if err := cache.Allocate(int(need.Total())); err != nil {
			return nil, err
		}
		return &leasing{&mockLlm{modelPath: model, vramByGPU: map[ml.DeviceID]uint64{}}, cache}, nil
	}
	s.kvcachedWrap(manager)
	s.Run(ctx)
	return s, manager
}

func kvcachedModel(t *testing.T, padding ...byte) (string, *ggml.GGML) {
	t.Helper()
	path, _ := createBinFile(t, ggml.KV{
		"general.architecture":          "llama",
		"llama.context_length":          uint32(4096),
		"llama.embedding_length":        uint32(512),
		"llama.block_count":             uint32(2),
		"llama.attention.head_count":    uint32(8),
		"llama.attention.head_count_kv": uint32(4),
		"tokenizer.ggml.tokens":         []string{" "},
		"tokenizer.ggml.scores":         []float32{0},
		"tokenizer.ggml.token_type":     []int32{0},
	}, nil)
	if len(padding) > 0 {
		file, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.Write(padding); err != nil {
			t.Fatal(err)
		}
		file.Close()
	}
	f, err := llm.LoadModel(path, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return path, f
}

// ask loads a model as a request does, and ends the request.
func ask(t *testing.T, s *Scheduler, name, path string) error {
	t.Helper()
	ctx, end := context.WithTimeout(t.Context(), 20*time.Second)
	defer end()
	opts := api.DefaultOptions()
	success, failure := s.getRunner(ctx, &Model{Name: name, ShortName: name, ModelPath: path}, opts, &api.Duration{Duration: time.Hour}, false, false, nil)
	select {
	case <-success:
		return nil
	case err := <-failure:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func loadedNames(s *Scheduler) []string {
	s.loadedMu.Lock()
	defer s.loadedMu.Unlock()
	names := []string{}
	for _, runner := range s.loaded {
		names = append(names, runner.model.ShortName)
	}
	slices.Sort(names)
	return names
}

func TestKVCachedMakesRoom(t *testing.T) {
	s, manager := kvcachedScheduler(t, t.Context(), 2.5)
	for i, want := range [][]string{{"a"}, {"a", "b"}, {"b", "c"}, {"c", "d"}} {
		path, _ := kvcachedModel(t)
		name := string(rune('a' + i))
		if err := ask(t, s, name, path); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := loadedNames(s)
		// which of two idle ones goes is upstream's choice; how many stay is not
		if len(got) != len(want) || !slices.Contains(got, name) {
			t.Errorf("after %s: %v", name, got)
		}
	}
	stats, err := manager.Stats()
	if err != nil || len(stats) != 2 {
		t.Errorf("leases: %+v, %v", stats, err)
	}
}

func TestKVCachedRefusesWhatNeverFits(t *testing.T) {
	s, _ := kvcachedScheduler(t, t.Context(), 1.5)
	small, f := kvcachedModel(t)
	huge, _ := kvcachedModel(t, make([]byte, int(llm.KVCachedNeed(llm.KVCachedLoad{ModelPath: small, GGML: f}).Total()))...)

	var refusal *kvcached.LimitError
	err := ask(t, s, "huge", huge)
	if !errors.As(err, &refusal) || refusal.Model != "huge:latest" || refusal.FitsAlone() {
		t.Errorf("with nothing loaded: %v", err)
	}
	if err := ask(t, s, "small", small); err != nil {
		t.Fatal(err)
	}
	err = ask(t, s, "huge", huge)
	if !errors.As(err, &refusal) || refusal.FitsAlone() {
		t.Errorf("beside another: %v", err)
	}
	if got := loadedNames(s); !slices.Equal(got, []string{"small"}) {
		t.Errorf("unloaded for a model that can never fit: %v", got)
	}
	if llm.IsOutOfMemory(err) || strings.Contains(err.Error(), "failed to load model") {
		t.Errorf("%q would be taken for something else", err)
	}
}

func TestKVCachedLeavesNoLeaseBehind(t *testing.T) {
	s, manager := kvcachedScheduler(t, t.Context(), 1.5)
	for i := range 4 {
		path, _ := kvcachedModel(t)
		if err := ask(t, s, string(rune('a'+i)), path); err != nil {
			t.Fatal(err)
		}
	}
	s.unloadAllRunners()
	if stats, err := manager.Stats(); err != nil || len(stats) != 0 {
		t.Errorf("%+v, %v", stats, err)
	}
}

func TestKVCachedAnnotate(t *testing.T) {
	models := []api.ProcessModelResponse{{Name: "a:latest"}, {Name: "other:latest"}}
	kvcachedAnnotate(models)
	if models[0].KVCached != nil {
		t.Errorf("while off: %+v", models[0].KVCached)
	}

	s, manager := kvcachedScheduler(t, t.Context(), 2)
	path, _ := kvcachedModel(t)
	if err := ask(t, s, "a", path); err != nil {
		t.Fatal(err)
	}
	kvcachedAnnotate(models)
	got := models[0].KVCached
	if got == nil || got.State != "leased" || got.Lease == 0 || got.Charge != got.Lease || got.Limit == nil || *got.Limit != manager.Settings().Limit {
		t.Errorf("%+v", got)
	}
	if got := models[1].KVCached; got == nil || got.State != "unmanaged" || got.Lease != 0 {
		t.Errorf("%+v", got)
	}
}

func TestKVCachedStart(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	for _, name := range []string{kvcached.EnabledVariable, kvcached.MemoryVariable} {
		t.Setenv(name, "")
	}
	defer kvcached.SetDefault(nil)

	s := InitScheduler(t.Context())
	stopped := 0
	stop := func() { stopped++ }
	if err := kvcachedStart(s, stop); err != nil || kvcached.Default() != nil || stopped != 0 {
		t.Errorf("unset: %v, %v", err, kvcached.Default())
	}

	t.Setenv(kvcached.EnabledVariable, "perhaps")
	if err := kvcachedStart(s, stop, stop); err == nil || !strings.Contains(err.Error(), kvcached.EnabledVariable) || stopped != 2 {
		t.Errorf("bad value: %v, stopped %d", err, stopped)
	}
	// Other subcommands only show it.
	if got := envconfig.AsMap()[kvcached.EnabledVariable].Value; got != "perhaps" {
		t.Errorf("shown: %v", got)
	}
	t.Setenv(kvcached.EnabledVariable, "")
	if err := os.MkdirAll(filepath.Join(home, ".ollama"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".ollama", "config.yaml"), []byte("kvcached:\n  memory_limit: 2GB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	values := envconfig.Values()
	if values[kvcached.EnabledVariable] != "false" || values[kvcached.MemoryVariable] != "2 GB" {
		t.Errorf("%q, %q", values[kvcached.EnabledVariable], values[kvcached.MemoryVariable])
	}
}
