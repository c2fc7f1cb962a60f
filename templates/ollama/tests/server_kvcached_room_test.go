package server

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sort"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/ml"
)

// Upstream keeps three models a GPU. Memory decides here, unless the user set a number.
func TestKVCachedCount(t *testing.T) {
	for _, c := range []struct {
		set    string
		loaded int
	}{{"", 5}, {"0", 5}, {"2", 2}, {"4", 4}} {
		t.Setenv("OLLAMA_MAX_LOADED_MODELS", c.set)
		b := newBench(t, 9)
		for i := range 5 {
			if err := b.ask(fmt.Sprint("m", i), kvcachedModel(t)); err != nil {
				t.Fatal(err)
			}
		}
		if got := b.runners(); len(got) != c.loaded || !slices.Contains(got, "m4") {
			t.Errorf("with %q set: %v", c.set, got)
		}
		if got := b.ledger.Commands(); len(got) != 0 {
			t.Errorf("with %q set: %v", c.set, got)
		}
	}
	kvcached.SetDefault(nil)
	if got := kvcachedMaxRunners(0); got != 0 {
		t.Errorf("while off: %d", got)
	}
}

// Where upstream unloads all the same, it takes the one that was used least recently, not the one with least time left.
func TestKVCachedLeastRecentlyUsedGoes(t *testing.T) {
	t.Setenv("OLLAMA_MAX_LOADED_MODELS", "3")
	b := newBench(t, 9)
	paths := map[string]string{}
	for i, name := range []string{"a", "b", "c"} {
		paths[name] = kvcachedModel(t)
		if err := b.ask(name, paths[name], keepAlive(time.Duration(10-i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.ask("a", paths["a"]); err != nil {
		t.Fatal(err)
	}
	if err := b.ask("d", kvcachedModel(t)); err != nil {
		t.Fatal(err)
	}
	if got := b.runners(); !slices.Equal(got, []string{"a", "c", "d"}) {
		t.Errorf("%v", got)
	}

	now := time.Now().UnixNano()
	forever, old, young := &runnerRef{sessionDuration: math.MaxInt64}, &runnerRef{sessionDuration: time.Hour}, &runnerRef{sessionDuration: time.Minute}
	forever.kvcached.lastUse.Store(1)
	old.kvcached.lastUse.Store(now - 5)
	young.kvcached.lastUse.Store(now)
	list := []*runnerRef{forever, young, old}
	sort.Sort(kvcachedOrder(list))
	if list[0] != old || list[1] != young || list[2] != forever {
		t.Error("those that are kept for ever do not go last")
	}
	kvcached.SetDefault(nil)
	sort.Sort(kvcachedOrder(list))
	if list[0] != young || list[2] != forever {
		t.Error("while off: not in upstream's order")
	}
}

func gpu(id string, total, free uint64) ml.DeviceInfo {
	return ml.DeviceInfo{DeviceID: ml.DeviceID{ID: id, Library: "CUDA"}, Name: "CUDA" + id, PCIID: "0000:0" + id + ":00.0", TotalMemory: total, FreeMemory: free}
}

// onGPUs is where a model's runner was started, by the GPUs it was shown.
func (b *bench) onGPUs(name string, changes ...with) (ids []string, free []uint64) {
	b.t.Helper()
	b.change = func(c *child) {
		ids, free = nil, nil
		for _, g := range c.gpus {
			ids, free = append(ids, g.ID), append(free, g.FreeMemory)
		}
	}
	if err := b.ask(name, kvcachedModel(b.t), changes...); err != nil {
		b.t.Fatal(err)
	}
	return ids, free
}

// A model goes to the GPU whose budget has most room, counting what is charged there now, not what upstream would predict.
func TestKVCachedSeveralGPUs(t *testing.T) {
	b := newBench(t, 0, func(s *kvcached.Settings) { s.Limit = 2 << 30 })
	b.gpus = []ml.DeviceInfo{gpu("1", 24<<30, 20<<30), gpu("2", 24<<30, 23<<30)}
	onAll := func(o *api.Options, _ **api.Duration) { o.NumGPU = -1 }
	placed := map[string]int{}
	for i := range 4 {
		ids, free := b.onGPUs(fmt.Sprint("m", i), onAll)
		if len(ids) != 1 {
			t.Fatalf("on %v", ids)
		}
		placed[ids[0]]++
		if free[0] > 2<<30 {
			t.Errorf("shown %d bytes free above the limit", free[0])
		}
	}
	if placed["1"] != 2 || placed["2"] != 2 {
		t.Errorf("%v", placed)
	}
	for _, g := range b.gpus {
		slots, _ := b.library.Ledger("." + g.PCIID).Slots()
		if len(slots) != 2 || slots[0].Fixed < kvcached.CUDAContext {
			t.Errorf("%s: %+v", g.PCIID, slots)
		}
	}

	// The user's own GPU, and all of them where models are to be spread.
	one := 1
	if ids, _ := b.onGPUs("named", onAll, func(o *api.Options, _ **api.Duration) { o.MainGPU = &one }); !slices.Equal(ids, []string{"2"}) {
		t.Errorf("main_gpu 1: %v", ids)
	}
	t.Setenv("OLLAMA_SCHED_SPREAD", "1")
	if ids, _ := b.onGPUs("spread", onAll); !slices.Equal(ids, []string{"1", "2"}) {
		t.Errorf("spread: %v", ids)
	}
	if ids, _ := b.onGPUs("cpu", func(o *api.Options, _ **api.Duration) { o.NumGPU = 0 }); len(ids) != 0 {
		t.Errorf("num_gpu 0: %v", ids)
	}
}

// A model larger than the limit gets what there is where it can spill to the CPU, and is refused where it cannot.
func TestKVCachedLargerThanTheLimit(t *testing.T) {
	b := newBench(t, 0, func(s *kvcached.Settings) { s.Limit = kvcached.CUDAContext + 1<<20 })
	b.gpus = []ml.DeviceInfo{gpu("1", 24<<30, 20<<30)}
	if err := b.ask("all", kvcachedModel(t), func(o *api.Options, _ **api.Duration) { o.NumGPU = 99 }); err == nil {
		t.Error("all layers asked for, and admitted")
	}
	ids, free := b.onGPUs("some", func(o *api.Options, _ **api.Duration) { o.NumGPU = -1 })
	b.loadedMu.Lock()
	for _, runner := range b.loaded {
		if c := runner.llama.(*child); c.leased >= c.cache.Need().Total() || c.leased < kvcached.CUDAContext {
			t.Errorf("told of a lease of %d for %d", c.leased, c.cache.Need().Total())
		}
	}
	b.loadedMu.Unlock()
	if len(ids) != 1 || free[0] != kvcached.CUDAContext+1<<20 {
		t.Errorf("on %v with %v free", ids, free)
	}
	slots, _ := b.library.Ledger("." + b.gpus[0].PCIID).Slots()
	if len(slots) != 1 || slots[0].Lease != kvcached.CUDAContext+1<<20 {
		t.Errorf("%+v", slots)
	}
}

// A managed runner's memory is back when it has ended: nobody looks for it on the device.
func TestKVCachedNoWaitForRecovery(t *testing.T) {
	b := newBench(t, 1.5)
	looked := 0
	s := &Scheduler{waitForRecovery: time.Minute, getGpuFn: func(context.Context, []ml.FilteredRunnerDiscovery) []ml.DeviceInfo { looked++; return nil }}
	runner := &runnerRef{gpus: []ml.DeviceID{{ID: "1", Library: "CUDA"}}, discreteGPUs: true, llama: &child{cache: b.manager.NewKVCache("m", kvcached.Need{Weights: 1})}}
	select {
	case <-s.waitForVRAMRecovery(runner, nil):
	case <-time.After(5 * time.Second):
		t.Error("waits")
	}
	if looked != 0 {
		t.Error("looked at the device")
	}
	runner.llama = &mockLlm{}
	s.waitForRecovery = time.Millisecond
	<-s.waitForVRAMRecovery(runner, nil)
	if looked == 0 {
		t.Error("a runner that is not managed is not waited for")
	}
}

// A request that ended at the limit unloads nobody, whatever else its error repeats from the runner's log.
func TestKVCachedLimitUnloadsNobody(t *testing.T) {
	b := newBench(t, 2.5)
	path := kvcachedModel(t)
	if err := b.ask("a", path); err != nil {
		t.Fatal(err)
	}
	ended := api.StatusError{StatusCode: 503, ErrorMessage: "This request was ended for want of memory: 4096 bytes\nggml: failed to allocate a buffer"}
	b.expireRunnersForRuntimeOOM(&Model{ModelPath: path}, ended)
	time.Sleep(50 * time.Millisecond)
	if got := b.runners(); len(got) != 1 {
		t.Fatal("unloaded")
	}
	b.expireRunnersForRuntimeOOM(&Model{ModelPath: path}, errOutOfMemory{})
	b.until("a device that ran out unloads", func() bool { return len(b.runners()) == 0 })
}
