package server

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"

	"github.com/ollama/ollama/envconfig"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
	"github.com/ollama/ollama/ml"
	"github.com/ollama/ollama/types/model"
)

// The hooks in the scheduler, and what they do there:
//
//	kvcached.go        starts the manager, and loads a model on the lease that was taken for it
//	kvcached_admit.go  requests for models that are not loaded wait for room
//	kvcached_place.go  on which devices, and how much of it
//	kvcached_run.go    requests for loaded models wait for them to wake; idle ones sleep, and end
//	kvcached_ps.go     what each model occupies
//
// None of them waits while refMu or loadedMu is held, or in one of the scheduler's two loops.

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
		sched.kvcachedAttach(manager)
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

// kvcachedAttach connects scheduler and manager.
func (s *Scheduler) kvcachedAttach(manager *kvcached.Manager) {
	manager.SetRoomWait(envconfig.LoadTimeout())
	manager.OnUnload(s.kvcachedUnload)
	s.getGpuFn = s.kvcachedWatch(manager, s.getGpuFn)
	s.loadFn = s.kvcachedLoad(manager, s.loadFn)
}

// kvcachedLoad loads a model on the lease that was taken for it. Whether it fits is decided by that, so that upstream's own
// check is passed over. A request that has no lease (its model was unloaded while it was in the queue, or a load is
// tried once more) goes back for one; the queue goes on with the next.
func (s *Scheduler) kvcachedLoad(manager *kvcached.Manager, load func(*LlmRequest, ml.SystemInfo, []ml.DeviceInfo, bool) bool) func(*LlmRequest, ml.SystemInfo, []ml.DeviceInfo, bool) bool {
	return func(req *LlmRequest, systemInfo ml.SystemInfo, gpus []ml.DeviceInfo, requireFull bool) bool {
		s.loadedMu.Lock()
		started := s.activeLoading != nil // has its lease already
		s.loadedMu.Unlock()
		if started || !kvcachedManages(req, gpus) {
			return load(req, systemInfo, gpus, requireFull)
		}

		key := schedulerModelKey(req.model)
		lease := s.kvcached.take(key, req)
		if lease == nil {
			s.kvcachedAgain(req)
			return false
		}
		defer s.kvcached.loaded(key)
		llm.KVCachedOffer(req.model.ModelPath, lease.cache, lease.size)
		again := load(req, systemInfo, lease.gpus(manager, gpus, requireFull), false)
		if cache, _ := llm.KVCachedWithdraw(req.model.ModelPath); cache != nil {
			cache.Free() // no runner was created
		}
		return again
	}
}

// kvcachedManages says whether a model that a request is for will run on devices with elastic memory.
func kvcachedManages(req *LlmRequest, gpus []ml.DeviceInfo) bool {
	if req.model.ModelPath == "" || req.model.IsMLX() {
		return false
	}
	return req.opts.NumGPU == 0 || len(gpus) == 0 || len(kvcachedGPUs(gpus)) > 0
}

func kvcachedName(m *Model) string {
	return model.ParseName(m.ShortName).DisplayShortest()
}
