package server

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/kvcached/kvcachedtest"
	"github.com/ollama/ollama/llm"
	"github.com/ollama/ollama/ml"
)

// child is a runner whose lease ends with it, as a process's does.
type child struct {
	*mockLlm
	cache   *kvcached.KVCache
	opts    api.Options
	gpus    []ml.DeviceInfo
	leased  uint64
	loading func()         // runs while it loads
	within  func(int) bool // nil: whatever num_ctx
}

func (c *child) KVCached() *kvcached.KVCache { return c.cache }

func (c *child) KVCachedWithin(numCtx int) bool { return c.within == nil || c.within(numCtx) }

func (c *child) Load(ctx context.Context, info ml.SystemInfo, gpus []ml.DeviceInfo, requireFull bool) ([]ml.DeviceID, error) {
	if c.loading != nil {
		c.loading()
	}
	return c.mockLlm.Load(ctx, info, gpus, requireFull)
}

func (c *child) Close() error {
	c.cache.Free()
	return c.mockLlm.Close()
}

// bench is a scheduler under a limit, with children that do nothing but occupy what they were leased.
type bench struct {
	*Scheduler
	t        *testing.T
	manager  *kvcached.Manager
	ledger   *kvcachedtest.Ledger // of host memory
	library  *kvcachedtest.Library
	gpus     []ml.DeviceInfo
	pause    atomic.Pointer[func()] // in the scheduler's loop, with no lock held
	ownBatch bool                   // requests name the size of their batch
	change   func(*child)           // before a child is handed to the scheduler
}

// newBench has room for so many models of kvcachedModel's size in host memory.
func newBench(t *testing.T, models float64, change ...func(*kvcached.Settings)) *bench {
	t.Helper()
	t.Setenv("OLLAMA_FLASH_ATTENTION", "1")
	// Upstream's lines for debugging read runners without their locks.
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	settings := kvcached.Settings{Enabled: true, Limit: uint64(models * float64(kvcachedSize(t))), Source: "a test", HostLimit: kvcached.NoLimit, Policy: "lru", Sleep: time.Hour}
	for _, f := range change {
		f(&settings)
	}
	b := &bench{t: t, library: &kvcachedtest.Library{}}
	var err error
	if b.manager, err = kvcached.Open(settings, b.library, ""); err != nil {
		t.Fatal(err)
	}
	b.ledger = b.library.Ledger("")
	kvcached.SetDefault(b.manager)
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(func() {
		stop()
		b.library.Close(b.manager)
		kvcached.SetDefault(nil)
	})

	b.Scheduler = InitScheduler(ctx)
	b.waitForRecovery = 10 * time.Millisecond
	b.getGpuFn = func(context.Context, []ml.FilteredRunnerDiscovery) []ml.DeviceInfo { return slices.Clone(b.gpus) }
	b.getSystemInfoFn = func() ml.SystemInfo {
		if pause := b.pause.Load(); pause != nil {
			(*pause)()
		}
		return getSystemInfoFn()
	}
	b.newServerFn = func(_ ml.SystemInfo, gpus []ml.DeviceInfo, path string, f *ggml.GGML, _, _ []string, opts api.Options, parallel int, config llm.LlamaServerConfig) (llm.LlamaServer, error) {
		mock := &mockLlm{modelPath: path, vramByGPU: map[ml.DeviceID]uint64{}}
		cache, leased := llm.KVCachedWithdraw(path)
		if cache == nil {
			return mock, nil
		}
		opts.NumCtx = llm.KVCachedReserve(b.manager, f, opts, parallel, config.ContextShift)
		mock.contextLength = opts.NumCtx
		c := &child{mockLlm: mock, cache: cache, opts: opts, gpus: gpus, leased: leased}
		for _, entry := range strings.Split(cache.Env()[kvcached.LeasesVariable], ";") {
			slot, path := kvcachedEntry(t, entry)
			b.library.Ledger(path).Attach(slot)
		}
		if b.change != nil {
			b.change(c)
		}
		return c, nil
	}
	b.kvcachedAttach(b.manager)
	b.Run(ctx)
	return b
}

// kvcachedEntry takes device,slot,limit,ledger apart.
func kvcachedEntry(t *testing.T, entry string) (slot int, path string) {
	t.Helper()
	fields := strings.Split(entry, ",")
	if len(fields) != 4 {
		t.Fatalf("a lease is told as %q", entry)
	}
	for _, digit := range fields[1] {
		slot = 10*slot + int(digit-'0')
	}
	return slot, fields[3]
}

func kvcachedModel(t *testing.T, padding ...byte) string {
	t.Helper()
	return kvcachedModelOf(t, "llama", padding...)
}

// kvcachedModelOf is a file of one of the architectures llama and gemma2, which has windows of 512 cells.
func kvcachedModelOf(t *testing.T, arch string, padding ...byte) string {
	t.Helper()
	path, _ := createBinFile(t, ggml.KV{
		"general.architecture":             arch,
		arch + ".context_length":           uint32(8192),
		arch + ".embedding_length":         uint32(512),
		arch + ".feed_forward_length":      uint32(1024),
		arch + ".block_count":              uint32(2),
		arch + ".attention.head_count":     uint32(8),
		arch + ".attention.head_count_kv":  uint32(4),
		arch + ".attention.sliding_window": uint32(512), // llama has no layers for it
		"tokenizer.ggml.tokens":            []string{" "},
		"tokenizer.ggml.scores":            []float32{0},
		"tokenizer.ggml.token_type":        []int32{0},
	}, nil)
	file, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// Weights that tell in the sizes: nothing but them sleeps.
	if _, err := file.Write(append(make([]byte, 8<<20), padding...)); err != nil {
		t.Fatal(err)
	}
	return path
}

// kvcachedSize is what the manager counts for a model of kvcachedModel.
func kvcachedSize(t *testing.T) uint64 {
	t.Helper()
	path := kvcachedModel(t)
	f, err := llm.LoadModel(path, 1024)
	if err != nil {
		t.Fatal(err)
	}
	opts := api.DefaultOptions()
	opts.NumCtx, opts.UseMMap = 2048, new(bool)
	return llm.KVCachedNeed(llm.KVCachedLoad{ModelPath: path, GGML: f, Options: opts}).Total()
}

// request is one that a client has sent.
type request struct {
	b       *bench
	success chan *runnerRef
	failure chan error
	end     context.CancelFunc
}

// with changes a request's options.
type with func(*api.Options, **api.Duration)

func numCtx(n int) with { return func(o *api.Options, _ **api.Duration) { o.NumCtx = n } }

func keepAlive(d time.Duration) with {
	return func(_ *api.Options, k **api.Duration) { *k = &api.Duration{Duration: d} }
}

func (b *bench) send(name, path string, changes ...with) *request {
	ctx, end := context.WithCancel(b.t.Context())
	b.t.Cleanup(end)
	opts := api.DefaultOptions()
	opts.NumCtx = 2048
	keep := &api.Duration{Duration: time.Hour}
	for _, change := range changes {
		change(&opts, &keep)
	}
	r := &request{b: b, end: end}
	r.success, r.failure = b.getRunner(ctx, &Model{Name: name, ShortName: name, ModelPath: path}, opts, keep, false, !b.ownBatch, nil)
	return r
}

// wait is until the request was handed a runner, or its error.
func (r *request) wait() (*runnerRef, error) {
	select {
	case runner := <-r.success:
		return runner, nil
	case err := <-r.failure:
		return nil, err
	case <-time.After(20 * time.Second):
		return nil, errors.New("no answer to a request")
	}
}

func (r *request) must() *runnerRef {
	r.b.t.Helper()
	runner, err := r.wait()
	if err != nil {
		r.b.t.Fatal(err)
	}
	return runner
}

// finish ends a request and waits until the scheduler has counted it down.
func (r *request) finish(runner *runnerRef) {
	r.b.t.Helper()
	runner.refMu.Lock()
	before := runner.refCount
	runner.refMu.Unlock()
	r.end()
	r.b.until("a request is counted down", func() bool {
		runner.refMu.Lock()
		defer runner.refMu.Unlock()
		return runner.refCount < before
	})
}

// ask loads a model as a request does, and ends the request.
func (b *bench) ask(name, path string, changes ...with) error {
	b.t.Helper()
	r := b.send(name, path, changes...)
	runner, err := r.wait()
	if err != nil {
		r.end()
		return err
	}
	r.finish(runner)
	return nil
}

func (b *bench) until(what string, holds func() bool) {
	b.t.Helper()
	for range 2000 {
		if holds() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	b.t.Fatalf("it does not come about that %s", what)
}

func (b *bench) runners() []string {
	b.loadedMu.Lock()
	defer b.loadedMu.Unlock()
	names := []string{}
	for _, runner := range b.loaded {
		names = append(names, runner.model.ShortName)
	}
	slices.Sort(names)
	return names
}

func (b *bench) states() map[string]string {
	b.t.Helper()
	stats, err := b.manager.Stats()
	if err != nil {
		b.t.Fatal(err)
	}
	states := map[string]string{}
	for _, stat := range stats {
		states[strings.TrimSuffix(stat.Name, ":latest")] = stat.State
	}
	return states
}
