package server

import (
	"log/slog"
	"maps"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
)

// kvcachedAnnotate adds what each model occupies to the models of /api/ps. On a GPU it is what is mapped there now, in place
// of what the runner said when it had loaded.
func (s *Server) kvcachedAnnotate(models []api.ProcessModelResponse) {
	manager := kvcached.Default()
	if manager == nil {
		return
	}
	stats, err := manager.Stats()
	if err != nil {
		slog.Warn("kvcached: the ledger cannot be read", "error", err)
		return
	}
	files := s.sched.kvcachedFiles()
	for i := range models {
		model := &models[i]
		model.KVCached = &api.KVCachedStatus{State: "unmanaged"}
		for _, stat := range stats {
			file, known := files[kvcachedShown{model.Name, model.Digest}]
			if known && stat.Model != file || !known && stat.Name != model.Name {
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

// kvcachedShown is a runner as /api/ps shows it: by the model that it was loaded for.
type kvcachedShown struct{ name, digest string }

// kvcachedFiles are the files of the loaded models. Models of several names may be one file, and its runner's then; the manager
// knows it by the name that was asked for last. A runner that is busy starting or ending is left out.
func (s *Scheduler) kvcachedFiles() map[kvcachedShown]string {
	s.loadedMu.Lock()
	runners := maps.Clone(s.loaded)
	s.loadedMu.Unlock()
	files := map[kvcachedShown]string{}
	for file, runner := range runners {
		if runner.refMu.TryLock() {
			if runner.model != nil {
				files[kvcachedShown{kvcachedName(runner.model), runner.model.Digest}] = file
			}
			runner.refMu.Unlock()
		}
	}
	return files
}
