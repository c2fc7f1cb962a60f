package server

import (
	"log/slog"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
)

// kvcachedAnnotate adds what each model occupies to the models of /api/ps. On a GPU it is what is mapped there now, in place
// of what the runner said when it had loaded.
func kvcachedAnnotate(models []api.ProcessModelResponse) {
	manager := kvcached.Default()
	if manager == nil {
		return
	}
	stats, err := manager.Stats()
	if err != nil {
		slog.Warn("kvcached: the ledger cannot be read", "error", err)
		return
	}
	for i := range models {
		model := &models[i]
		model.KVCached = &api.KVCachedStatus{State: "unmanaged"}
		for _, stat := range stats {
			if stat.Name != model.Name {
				continue
			}
			model.KVCached = &api.KVCachedStatus{
				State:         stat.State,
				KVMapped:      stat.Mapped,
				KVReserved:    stat.Reserved,
				WeightsMapped: stat.Weights,
				ContextBytes:  stat.Context,
				HostBytes:     stat.Host,
				Lease:         stat.Lease,
				Charge:        stat.Charge,
			}
			if stat.Limit != kvcached.NoLimit {
				limit := stat.Limit
				model.KVCached.Limit = &limit
			}
			if stat.OnGPU && stat.State != kvcached.StateLeased {
				onCPU := model.Size - min(model.Size, model.SizeVRAM)
				model.SizeVRAM = int64(stat.VRAM)
				model.Size = onCPU + model.SizeVRAM
			}
		}
	}
}
