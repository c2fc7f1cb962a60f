package server

import (
	"context"
	"log/slog"
	"runtime"
	"slices"
	"strings"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/envconfig"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
	"github.com/ollama/ollama/ml"
	"github.com/ollama/ollama/types/model"
)

// kvcachedPlace is where a model is to run, and what it takes there.
type kvcachedPlace struct {
	managed bool
	need    kvcached.Need
	devices []ml.DeviceInfo // that it is leased on; empty for host memory
	shown   []ml.DeviceInfo // that upstream's code chooses among; empty for host memory
	whole   bool            // it cannot spill to the CPU
	opts    api.Options     // of the request that it was found for
}

// kvcachedGPUs are those of the devices whose memory is managed.
func kvcachedGPUs(gpus []ml.DeviceInfo) []ml.DeviceInfo {
	var found []ml.DeviceInfo
	for _, gpu := range gpus {
		if strings.EqualFold(gpu.Library, "CUDA") && gpu.PCIID != "" {
			found = append(found, gpu)
		}
	}
	return found
}

// kvcachedDevice is a GPU as the manager knows it.
func kvcachedDevice(gpu ml.DeviceInfo) kvcached.Device {
	return kvcached.Device{ID: strings.ToLower(gpu.PCIID), Name: gpu.Name, Total: gpu.TotalMemory, Free: gpu.FreeMemory}
}

// kvcachedWatch tells the manager which devices there are, whenever they were looked for.
func (s *Scheduler) kvcachedWatch(manager *kvcached.Manager, find func(context.Context, []ml.FilteredRunnerDiscovery) []ml.DeviceInfo) func(context.Context, []ml.FilteredRunnerDiscovery) []ml.DeviceInfo {
	return func(ctx context.Context, runners []ml.FilteredRunnerDiscovery) []ml.DeviceInfo {
		gpus := find(ctx, runners)
		s.kvcached.mu.Lock()
		known := s.kvcached.devices != nil && slices.EqualFunc(s.kvcached.devices, gpus, func(a, b ml.DeviceInfo) bool { return a.DeviceID == b.DeviceID })
		s.kvcached.devices = append([]ml.DeviceInfo{}, gpus...)
		s.kvcached.mu.Unlock()
		if !known {
			var devices []kvcached.Device
			for _, gpu := range kvcachedGPUs(gpus) {
				devices = append(devices, kvcachedDevice(gpu))
			}
			manager.SetDevices(devices)
		}
		return gpus
	}
}

// kvcachedFind decides where a request's model goes, from its metadata and the devices' budgets. It is upstream's choice
// wherever that does not depend on free memory: the GPU that the user named, all of them where models are to be spread.
// Else it is the one GPU with most room among those whose limit the model fits in; else all.
func (s *Scheduler) kvcachedFind(manager *kvcached.Manager, req *LlmRequest) (kvcachedPlace, error) {
	place := kvcachedPlace{opts: req.opts}
	f, err := llm.LoadModel(req.model.ModelPath, 1024)
	if err != nil {
		return place, err
	}
	s.kvcached.mu.Lock()
	all := s.kvcached.devices
	s.kvcached.mu.Unlock()
	if all == nil && req.opts.NumGPU != 0 {
		all = s.getGpuFn(req.ctx, nil)
	}
	if place.managed = kvcachedManages(req, all); !place.managed {
		return place, nil
	}

	var gpus []ml.DeviceInfo
	if req.opts.NumGPU != 0 {
		gpus = kvcachedGPUs(all)
	}
	place.whole = len(gpus) == 0 || req.opts.NumGPU > 0
	place.devices, place.shown = gpus, gpus
	place.need = s.kvcachedNeed(manager, req, f, gpus)
	if len(gpus) <= 1 {
		return place, nil
	}

	if main := req.opts.MainGPU; main != nil {
		if 0 <= *main && *main < len(gpus) {
			place.devices = gpus[*main : *main+1]
		}
		return place, nil
	}
	if envconfig.SchedSpread() {
		return place, nil
	}
	best, mostRoom := -1, uint64(0)
	for i, gpu := range gpus {
		limit, charged, err := manager.Budget(kvcachedDevice(gpu))
		if err != nil {
			slog.Warn("kvcached: a GPU's budget is not known", "device", gpu.PCIID, "error", err)
			continue
		}
		limit = min(limit, gpu.TotalMemory)
		room := limit - min(charged, limit)
		if place.need.Total() <= limit && (best < 0 || room > mostRoom) {
			best, mostRoom = i, room
		}
	}
	if best >= 0 {
		place.devices = gpus[best : best+1]
		place.shown = place.devices
	}
	return place, nil
}

// kvcachedNeed is what a request's model needs on the devices that its layers go to.
func (s *Scheduler) kvcachedNeed(manager *kvcached.Manager, req *LlmRequest, f *ggml.GGML, gpus []ml.DeviceInfo) kvcached.Need {
	parallel := 1
	completion := req.model.CheckCapabilities(model.CapabilityCompletion) == nil
	if completion {
		parallel = max(int(envconfig.NumParallel()), 1)
	}
	// Batch and mapping as the load will choose them, on a copy of the request.
	sized := *req
	numCtx := effectiveLlamaServerContext(req.opts.NumCtx, f, parallel)
	predicted := llm.PredictServerVRAM(req.model.ModelPath, f, numCtx)
	available, _, _ := availableMemoryForPlacement(ml.SystemInfo{}, gpus, req.opts)
	sized.applyAutomaticGenerationBatch(completion, numCtx, predicted, available, llm.LlamaServerFlashAttention(gpus), gpus)
	if disableMmapDefaultReason(runtime.GOOS, req.opts, gpus, f.KV().BlockCount(), predicted, available) != "" {
		sized.opts.UseMMap = new(bool)
	}
	sized.opts.NumCtx = effectiveModelContext(req.opts.NumCtx, f)
	sized.opts.NumCtx = llm.KVCachedReserve(manager, f, sized.opts, parallel, req.contextShift && len(req.model.ProjectorPaths) == 0)

	need := llm.KVCachedNeed(llm.KVCachedLoad{
		ModelPath: req.model.ModelPath, GGML: f, Adapters: req.model.AdapterPaths, Projectors: req.model.ProjectorPaths,
		Draft: llamaServerConfigForModel(req.model).DraftModelPath, KVCacheType: envconfig.KvCacheType(),
		Options: sized.opts, Parallel: parallel, GPUs: gpus,
	})
	if layers := int(f.KV().BlockCount()) + 1; len(gpus) > 0 && 0 < req.opts.NumGPU && req.opts.NumGPU < layers {
		// the user's own choice of layers
		need = need.Split([]uint64{uint64(req.opts.NumGPU), uint64(layers - req.opts.NumGPU)})[0]
	}
	return need
}

// budgets are the devices that the lease is taken on.
func (p *kvcachedPlace) budgets() []kvcached.Device {
	if len(p.devices) == 0 {
		return []kvcached.Device{{ID: kvcached.HostID}}
	}
	var devices []kvcached.Device
	for _, gpu := range p.devices {
		devices = append(devices, kvcachedDevice(gpu))
	}
	return devices
}

// serves says whether a lease taken for this place is enough for another request for the same model.
func (p *kvcachedPlace) serves(req *LlmRequest) bool {
	sameGPU := func(a, b *int) bool { return a == b || a != nil && b != nil && *a == *b }
	return req.opts.NumGPU == p.opts.NumGPU && sameGPU(req.opts.MainGPU, p.opts.MainGPU) && req.opts.NumCtx <= p.opts.NumCtx &&
		req.opts.NumBatch <= p.opts.NumBatch
}

// gpus are the devices that upstream's code is shown for a load on this lease. Their free memory is what the budget leaves,
// with the lease itself; where nothing else is loaded, no more than was found.
func (l *kvcachedLease) gpus(manager *kvcached.Manager, found []ml.DeviceInfo, besideOthers bool) []ml.DeviceInfo {
	var shown []ml.DeviceInfo
	for _, gpu := range found {
		if !slices.ContainsFunc(l.place.shown, func(s ml.DeviceInfo) bool { return s.DeviceID == gpu.DeviceID }) {
			continue
		}
		limit, charged, err := manager.Budget(kvcachedDevice(gpu))
		if err != nil {
			slog.Warn("kvcached: a GPU's budget is not known", "device", gpu.PCIID, "error", err)
		} else {
			limit = min(limit, gpu.TotalMemory)
			own := l.place.need.Total() / uint64(max(len(l.place.devices), 1))
			free := limit - min(limit, charged-min(charged, own))
			if besideOthers {
				gpu.FreeMemory = free
			} else {
				gpu.FreeMemory = min(gpu.FreeMemory, free)
			}
		}
		shown = append(shown, gpu)
	}
	return shown
}
