package server

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"sort"
	"sync/atomic"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
)

// kvcachedRunner is what a runner keeps for elastic memory.
type kvcachedRunner struct {
	lastUse atomic.Int64 // Unix time in ns when a request last took or left it; 0 before
}

// kvcachedCache is the cache of a runner, nil for one that does not take part.
func (runner *runnerRef) kvcachedCache() *kvcached.KVCache {
	if child, ok := runner.llama.(interface{ KVCached() *kvcached.KVCache }); ok {
		return child.KVCached()
	}
	return nil
}

// kvcachedManaged says whether the runner's memory is accounted for in a ledger, so that it is known to be free as soon as
// the runner has ended.
func (runner *runnerRef) kvcachedManaged() bool { return runner.kvcachedCache() != nil }

// kvcachedHandOver hands a runner to the request that has just been counted as one of its users, once its model is awake.
// Held: runner.refMu; so the wait is a goroutine's.
func (pending *LlmRequest) kvcachedHandOver(runner *runnerRef) {
	runner.kvcached.lastUse.Store(time.Now().UnixNano())
	cache := runner.kvcachedCache()
	if cache == nil {
		pending.successCh <- runner
		return
	}
	cache.SetPinned(kvcachedPinned(runner.sessionDuration))
	cache.Begin()
	go func() {
		started := time.Now()
		ctx, cancel := kvcachedPatience(pending.ctx)
		defer cancel()
		err := cache.Awake(ctx)
		switch {
		case err == nil:
			pending.successCh <- runner
			return
		case pending.ctx.Err() != nil:
			err = pending.ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			err = kvcachedBusy(kvcachedName(pending.model), "its turn to wake", started)
		default:
			err = kvcachedRetry{err} // its process has ended, or cannot wake now
		}
		slog.Info("kvcached: a request ends before its model was awake", "model", kvcachedName(pending.model), "waited", time.Since(started), "reason", err)
		pending.kvcachedFail(err)
	}()
}

// kvcachedEnd counts a request down again. Held: refMu.
func (runner *runnerRef) kvcachedEnd() {
	runner.kvcached.lastUse.Store(time.Now().UnixNano())
	if cache := runner.kvcachedCache(); cache != nil {
		cache.End()
	}
}

// kvcachedPinned says whether a keep-alive time means for ever.
func kvcachedPinned(keepAlive time.Duration) bool { return keepAlive == math.MaxInt64 }

// kvcachedExpire does what is due when a runner's keep-alive time is over: its model goes to sleep, and is unloaded when it
// has slept for as long as the settings say, unless a request comes first. One that cannot sleep, or has no time left, is
// unloaded now. Held: refMu.
func (s *Scheduler) kvcachedExpire(runner *runnerRef) {
	cache, manager := runner.kvcachedCache(), kvcached.Default()
	if cache == nil || manager == nil || runner.sessionDuration <= 0 || manager.Settings().Sleep <= 0 || !cache.CanSleep() {
		s.expiredCh <- runner
		return
	}
	if runner.refCount > 0 {
		return // a request was faster; the next timer is set when it ends
	}
	wait := manager.Settings().Sleep
	slog.Info("kvcached: keep-alive time is over, the model goes to sleep", "runner", runner, "unloaded_after", wait)
	cache.Sleep()
	runner.expiresAt = time.Now().Add(wait)
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		runner.refMu.Lock()
		defer runner.refMu.Unlock()
		if runner.expireTimer != timer {
			return // stopped, too late for the timer itself to notice
		}
		slog.Info("kvcached: asleep for long enough, unloading", "runner", runner)
		runner.expireTimer = nil
		s.expiredCh <- runner
	})
	runner.expireTimer = timer
}

// kvcachedUnload unloads a model that the manager wants to have gone: one that sleeps and whose context is needed. It only
// starts to. False: the model is in use, is kept for ever, or is busy starting or ending.
func (s *Scheduler) kvcachedUnload(path string) bool {
	s.loadedMu.Lock()
	runner := s.loaded[path]
	s.loadedMu.Unlock()
	if runner == nil || !runner.refMu.TryLock() {
		return false
	}
	defer runner.refMu.Unlock()
	if runner.refCount > 0 || runner.loading || runner.model == nil || kvcachedPinned(runner.sessionDuration) {
		return false
	}
	if runner.expireTimer != nil {
		runner.expireTimer.Stop()
		runner.expireTimer = nil
	}
	runner.sessionDuration = 0
	slog.Info("kvcached: unloading a sleeper for its room", "runner", runner)
	go func() { s.expiredCh <- runner }()
	return true
}

// kvcachedMaxRunners lifts upstream's count of models a GPU where the user set none: what fits is decided by memory.
func kvcachedMaxRunners(set uint) uint {
	if set > 0 || kvcached.Default() == nil {
		return set
	}
	return math.MaxInt32
}

// kvcachedOrder is the order in which runners are looked at when one has to be unloaded: that of their last use, those
// that are kept for ever last. Without elastic memory it is upstream's.
func kvcachedOrder(runners []*runnerRef) sort.Interface {
	if kvcached.Default() == nil {
		return ByDurationAndName(runners)
	}
	return kvcachedLRU(runners)
}

type kvcachedLRU []*runnerRef

func (a kvcachedLRU) Len() int      { return len(a) }
func (a kvcachedLRU) Swap(i, j int) { a[i], a[j] = a[j], a[i] }
func (a kvcachedLRU) Less(i, j int) bool {
	p, q := kvcachedPinned(a[i].sessionDuration), kvcachedPinned(a[j].sessionDuration)
	if p != q {
		return q
	}
	return a[i].kvcached.lastUse.Load() < a[j].kvcached.lastUse.Load()
}

// kvcachedWithin takes a request's context for the runner's where it is no larger than the one that is reserved: it needs
// no reload, and is bounded with each completion; but for a model that could shift in the request's context, and cannot in
// that one. Held: refMu.
func (runner *runnerRef) kvcachedWithin(req *LlmRequest, opts *api.Runner) {
	if !runner.kvcachedManaged() || opts.NumCtx > runner.Options.NumCtx {
		return
	}
	if child, ok := runner.llama.(interface{ KVCachedWithin(int) bool }); ok && !child.KVCachedWithin(opts.NumCtx) {
		return
	}
	opts.NumCtx = runner.Options.NumCtx
	// The batch of an embedding model follows the context where nobody chose it; a larger one serves as well.
	if !req.numBatchAuto && opts.NumBatch == llm.DefaultEmbeddingNumBatchForContext(req.opts.NumCtx) && opts.NumBatch < runner.Options.NumBatch {
		opts.NumBatch = runner.Options.NumBatch
	}
}
