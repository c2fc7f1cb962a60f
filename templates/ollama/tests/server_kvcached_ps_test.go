package server

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/ml"
)

func TestKVCachedAnnotate(t *testing.T) {
	models := []api.ProcessModelResponse{{Name: "a:latest"}, {Name: "b:latest"}, {Name: "other:latest"}}
	(&Server{}).kvcachedAnnotate(models)
	if text, err := json.Marshal(models); err != nil || strings.Contains(string(text), "kvcached") {
		t.Errorf("while off: %s, %v", text, err)
	}

	b := newBench(t, 1.5)
	b.asleep("a", "b")
	(&Server{sched: b.Scheduler}).kvcachedAnnotate(models)
	asleep, awake := models[0].KVCached, models[1].KVCached
	if asleep.State != "asleep" || asleep.WeightsMapped != 0 || asleep.HostBytes == 0 || asleep.KVReserved == 0 {
		t.Errorf("asleep: %+v", asleep)
	}
	if awake.State != "awake" || awake.WeightsMapped == 0 || awake.Lease == 0 || awake.Charge != awake.Lease || awake.HostBytes != 0 {
		t.Errorf("awake: %+v", awake)
	}
	if awake.Limit == nil || *awake.Limit != b.manager.Settings().Limit || asleep.Charge >= awake.Charge {
		t.Errorf("limits and charges: %+v, %+v", awake, asleep)
	}
	if got := models[2].KVCached; got == nil || got.State != "unmanaged" || got.Lease != 0 {
		t.Errorf("%+v", got)
	}
	text, err := json.Marshal(awake)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"state", "kv_mapped", "kv_reserved", "weights_mapped", "context_bytes", "host_bytes", "limit", "lease", "charge"} {
		if !strings.Contains(string(text), `"`+key+`":`) {
			t.Errorf("no %s in %s", key, text)
		}
	}
}

// What a model has on a GPU is what is mapped there now.
func TestKVCachedSizeOnAGPU(t *testing.T) {
	b := newBench(t, 0, func(s *kvcached.Settings) { s.Limit = 2 << 30 })
	b.gpus = []ml.DeviceInfo{gpu("1", 24<<30, 20<<30)}
	path := kvcachedModel(t)
	if err := b.ask("a", path, func(o *api.Options, _ **api.Duration) { o.NumGPU = -1 }); err != nil {
		t.Fatal(err)
	}
	sizes := func() (int64, int64) {
		models := []api.ProcessModelResponse{{Name: "a:latest", Size: 900, SizeVRAM: 700}}
		(&Server{sched: b.Scheduler}).kvcachedAnnotate(models)
		return models[0].Size, models[0].SizeVRAM
	}
	slots, _ := b.library.Ledger("." + b.gpus[0].PCIID).Slots()
	if size, vram := sizes(); vram != int64(slots[0].Claim) || size != vram+200 {
		t.Errorf("awake: %d of %d, claimed %d", vram, size, slots[0].Claim)
	}
	b.loadedMu.Lock()
	cache := b.loaded[path].kvcachedCache()
	b.loadedMu.Unlock()
	cache.Sleep()
	b.until("it sleeps", func() bool { return b.states()["a"] == "asleep" })
	if size, vram := sizes(); vram != 0 || size != 200 {
		t.Errorf("asleep: %d of %d", vram, size)
	}
}

// Two names of one file have one runner, which is shown by the name that it was loaded for; its lease may be another's.
func TestKVCachedTwoNamesOfOneFile(t *testing.T) {
	b := newBench(t, 2)
	path := kvcachedModel(t)
	if err := b.ask("first", path); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"first", "second"} {
		b.loadedMu.Lock()
		b.loaded[path].refMu.Lock()
		b.loaded[path].model = &Model{Name: name, ShortName: name, ModelPath: path, Digest: "of " + name}
		b.loaded[path].refMu.Unlock()
		b.loadedMu.Unlock()
		models := []api.ProcessModelResponse{{Name: name + ":latest", Digest: "of " + name}, {Name: "other:latest"}}
		(&Server{sched: b.Scheduler}).kvcachedAnnotate(models)
		if got := models[0].KVCached; got.State != "awake" || got.Lease == 0 {
			t.Errorf("loaded for %s: %+v", name, got)
		}
		if got := models[1].KVCached.State; got != "unmanaged" {
			t.Errorf("another: %s", got)
		}
	}
}
