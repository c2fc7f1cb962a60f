package server

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/envconfig"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
	"github.com/ollama/ollama/ml"
	"github.com/ollama/ollama/types/model"
)

// kvcachedStart reads the settings and, where they ask for it, puts the models of this server under one limit. Its error
// ends the server; stop releases what the caller would otherwise have to.
func kvcachedStart(sched *Scheduler, stop ...context.CancelFunc) error {
	manager, err := kvcachedOpen()
	if err != nil {
		for _, cancel := range stop {
			cancel()
		}
		return err
	}
	kvcached.SetDefault(manager)
	if manager != nil {
		slog.Info("kvcached: elastic memory is on", "manager", manager.Describe())
		sched.kvcachedWrap(manager)
	}
	return nil
}

func kvcachedOpen() (*kvcached.Manager, error) {
	settings, err := kvcached.LoadSettings()
	if err != nil {
		return nil, err
	}
	manager, err := kvcached.Start(settings, kvcachedLibraryDirs())
	if errors.Is(err, kvcached.ErrUnsupported) {
		slog.Warn(err.Error())
		return nil, nil
	}
	return manager, err
}

// kvcachedLibraryDirs are the directories of the runner and of its libraries: the library belongs beside them.
func kvcachedLibraryDirs() []string {
	directories := []string{ml.LibOllamaPath}
	if runner, err := llm.FindLlamaServer(); err == nil {
		directories = append(directories, filepath.Dir(runner))
	}
	return directories
}

// kvcachedWrap lets the scheduler make room under the limit as it makes room on a device: by unloading models, one after
// the other, until the new one fits.
func (s *Scheduler) kvcachedWrap(manager *kvcached.Manager) {
	load := s.loadFn
	s.loadFn = func(req *LlmRequest, systemInfo ml.SystemInfo, gpus []ml.DeviceInfo, requireFull bool) bool {
		if req.model.ModelPath != "" {
			manager.SetName(req.model.ModelPath, kvcachedName(req.model))
			if evict, refusal := s.kvcachedAdmit(manager, req, requireFull); refusal != nil {
				slog.Info("kvcached: model refused", "model", req.model.ModelPath, "error", refusal)
				req.errCh <- refusal
				return false
			} else if evict {
				return true
			}
		}
		return load(req, systemInfo, gpus, requireFull)
	}
}

// kvcachedAdmit decides about a model that is to run beside others: whether one of them has to go first, or that the
// model would not even fit alone, for which nobody should be unloaded. With no others loaded the lease itself decides.
// Held locks: none.
func (s *Scheduler) kvcachedAdmit(manager *kvcached.Manager, req *LlmRequest, besideOthers bool) (evict bool, refusal error) {
	s.loadedMu.Lock()
	started := s.activeLoading != nil // has its lease already
	s.loadedMu.Unlock()
	if !besideOthers || started || manager.Settings().Limit == kvcached.NoLimit {
		return false, nil
	}

	f, err := llm.LoadModel(req.model.ModelPath, 1024)
	if err != nil {
		return false, nil // load reports it
	}
	need := llm.KVCachedNeed(llm.KVCachedLoad{
		ModelPath: req.model.ModelPath, GGML: f, Adapters: req.model.AdapterPaths, Projectors: req.model.ProjectorPaths,
		Draft: llamaServerConfigForModel(req.model).DraftModelPath, KVCacheType: envconfig.KvCacheType(),
	})
	err = manager.Check(req.model.ModelPath, need)
	var limit *kvcached.LimitError
	switch {
	case err == nil:
		return false, nil
	case errors.As(err, &limit) && limit.FitsAlone():
		slog.Info("kvcached: making room", "model", limit.Model, "need", kvcached.FormatSize(need.Total()),
			"charged", kvcached.FormatSize(limit.Charged()), "limit", kvcached.FormatSize(limit.Limit))
		return true, nil
	default:
		return false, err
	}
}

func kvcachedName(m *Model) string {
	return model.ParseName(m.ShortName).DisplayShortest()
}

// kvcachedAnnotate adds what each model occupies to the models of /api/ps.
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
		status := &api.KVCachedStatus{State: "unmanaged"}
		for _, stat := range stats {
			if stat.Name != models[i].Name {
				continue
			}
			*status = api.KVCachedStatus{
				State:      stat.State,
				KVMapped:   stat.Mapped,
				KVReserved: stat.Reserved,
				Lease:      stat.Lease,
				Charge:     stat.Charge,
			}
		}
		if limit := manager.Settings().Limit; limit != kvcached.NoLimit {
			status.Limit = &limit
		}
		models[i].KVCached = status
	}
}
