package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/ollama/ollama/envconfig"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/ml"
)

// kvcachedRequest is what a request keeps while it waits to be scheduled.
type kvcachedRequest struct {
	order uint64 // of arrival, from 1
}

// kvcachedQueues is what the scheduler keeps for elastic memory.
type kvcachedQueues struct {
	mu      sync.Mutex
	arrived uint64
	waiting map[string][]*LlmRequest  // by model: requests that wait for a lease, in order of arrival
	leases  map[string]*kvcachedLease // by model: taken, for the load that comes next
	loading map[string]bool           // by model: the load is under way, on its lease
	devices []ml.DeviceInfo           // as of the last discovery; nil before
}

// kvcachedLease is a lease between its admission and the load that uses it.
type kvcachedLease struct {
	cache   *kvcached.KVCache
	size    uint64 // on all devices; less than the need where the model is to spill to the CPU
	place   kvcachedPlace
	holders map[*LlmRequest]bool // in the scheduler's queue, each of them may be the one to load the model
}

// kvcachedRetry is an error that another try may not meet: Ollama answers it with status 503, as it does when it is busy.
type kvcachedRetry struct{ error }

func (e kvcachedRetry) Unwrap() error        { return e.error }
func (e kvcachedRetry) Is(target error) bool { return target == ErrMaxQueue }

// kvcachedBusy is the error of a request that waited for as long as a load may stall.
func kvcachedBusy(model, reason string, since time.Time) error {
	return kvcachedRetry{fmt.Errorf("kvcached: server busy, model %s waited %s for %s; please try again",
		model, time.Since(since).Round(time.Millisecond), reason)}
}

// kvcachedQueue has a request wait for room for its model, in a goroutine, before it joins the scheduler's own queue. False:
// the model is not managed, and stock's path goes on.
func (s *Scheduler) kvcachedQueue(req *LlmRequest) bool {
	if kvcached.Default() == nil || req.model.ModelPath == "" || req.model.IsMLX() {
		return false
	}
	q := &s.kvcached
	q.mu.Lock()
	defer q.mu.Unlock()
	queued := len(s.pendingReqCh)
	for _, requests := range q.waiting {
		queued += len(requests)
	}
	if queued >= max(cap(s.pendingReqCh), 1) {
		req.errCh <- ErrMaxQueue
		return true
	}
	q.arrived++
	req.kvcached.order = q.arrived
	s.kvcachedWait(req)
	// One that is gone leaves nothing behind: no place in a queue, no lease, and no handler that waits for an answer.
	context.AfterFunc(req.ctx, func() { s.kvcachedGone(req) })
	return true
}

// kvcachedAgain puts a request that the scheduler had taken up already back, at its place among those for its model.
func (s *Scheduler) kvcachedAgain(req *LlmRequest) {
	s.kvcached.mu.Lock()
	defer s.kvcached.mu.Unlock()
	if req.ctx.Err() != nil {
		req.kvcachedFail(req.ctx.Err())
		return
	}
	s.kvcachedWait(req)
}

// kvcachedWait puts a request into the queue of its model. Held: kvcached.mu.
func (s *Scheduler) kvcachedWait(req *LlmRequest) {
	q := &s.kvcached
	if q.waiting == nil {
		q.waiting, q.leases, q.loading = map[string][]*LlmRequest{}, map[string]*kvcachedLease{}, map[string]bool{}
	}
	key := schedulerModelKey(req.model)
	requests, served := q.waiting[key]
	at, _ := slices.BinarySearchFunc(requests, req, func(a, b *LlmRequest) int { return int(a.kvcached.order) - int(b.kvcached.order) })
	q.waiting[key] = slices.Insert(requests, at, req)
	if !served {
		go s.kvcachedServe(key)
	}
}

// kvcachedGone removes what is left of a request whose client has gone, or has its answer.
func (s *Scheduler) kvcachedGone(req *LlmRequest) {
	q := &s.kvcached
	key := schedulerModelKey(req.model)
	q.mu.Lock()
	if i := slices.Index(q.waiting[key], req); i >= 0 {
		q.waiting[key] = slices.Delete(q.waiting[key], i, i+1)
	}
	var unused *kvcachedLease
	if lease := q.leases[key]; lease != nil {
		delete(lease.holders, req)
		if len(lease.holders) == 0 && len(q.waiting[key]) == 0 {
			unused = lease
			delete(q.leases, key)
		}
	}
	q.mu.Unlock()
	if unused != nil {
		slog.Info("kvcached: lease given back, nobody waits for the model any more", "model", key)
		unused.cache.Free()
	}
	req.kvcachedFail(req.ctx.Err())
}

// kvcachedFail answers a request that nobody has answered yet.
func (req *LlmRequest) kvcachedFail(err error) {
	select {
	case req.errCh <- err:
	default:
	}
}

// kvcachedServe moves the requests for one model on, in their order, as soon as there is a lease for the next of them or
// the model needs none. It ends when none is left.
func (s *Scheduler) kvcachedServe(key string) {
	q := &s.kvcached
	for {
		s.loadedMu.Lock()
		loaded := s.loaded[key] != nil
		s.loadedMu.Unlock()

		q.mu.Lock()
		if len(q.waiting[key]) == 0 {
			delete(q.waiting, key)
			q.mu.Unlock()
			return
		}
		req := q.waiting[key][0]
		lease := q.leases[key]
		ready := loaded || q.loading[key] || lease != nil
		if ready {
			q.waiting[key] = slices.Delete(q.waiting[key], 0, 1)
			if lease != nil {
				lease.holders[req] = true
			}
		}
		q.mu.Unlock()
		if !ready {
			s.kvcachedAdmit(key, req)
			continue
		}
		if req.ctx.Err() != nil {
			s.kvcachedGone(req)
			continue
		}
		select {
		case s.pendingReqCh <- req:
		case <-req.ctx.Done(): // kvcachedGone answers
		}
	}
}

// kvcachedAdmit waits for a lease for a request. What cannot be had is the request's error, and the next one's turn.
func (s *Scheduler) kvcachedAdmit(key string, req *LlmRequest) {
	lease, err := s.kvcachedTake(req)
	q := &s.kvcached
	q.mu.Lock()
	defer q.mu.Unlock()
	at := slices.Index(q.waiting[key], req)
	switch {
	case err != nil:
		if at >= 0 {
			q.waiting[key] = slices.Delete(q.waiting[key], at, at+1)
		}
		req.kvcachedFail(err)
	case at < 0 && len(q.waiting[key]) == 0:
		if lease.cache != nil {
			lease.cache.Free() // gone meanwhile, with everybody else
		}
	case lease.cache == nil:
		// not managed on the devices there are: it needs no lease
		q.waiting[key] = slices.DeleteFunc(q.waiting[key], func(r *LlmRequest) bool { return r == req })
		go s.kvcachedPass(req)
	default:
		q.leases[key] = lease
	}
}

// kvcachedPass hands a request on to the scheduler's own queue.
func (s *Scheduler) kvcachedPass(req *LlmRequest) {
	select {
	case s.pendingReqCh <- req:
	case <-req.ctx.Done():
	}
}

// kvcachedTake finds out what a request's model needs, and waits until the manager has made room for it.
func (s *Scheduler) kvcachedTake(req *LlmRequest) (*kvcachedLease, error) {
	manager := kvcached.Default()
	started := time.Now()
	place, err := s.kvcachedFind(manager, req)
	if err != nil || !place.managed {
		return &kvcachedLease{}, err
	}
	ctx, cancel := kvcachedPatience(req.ctx)
	defer cancel()
	cache, err := manager.Admit(ctx, kvcached.Request{
		Model: req.model.ModelPath, Name: kvcachedName(req.model), Need: place.need, Devices: place.budgets(),
		Pinned: kvcachedPinned(req.keepAlive()), Whole: place.whole,
	})
	var limit *kvcached.LimitError
	switch {
	case err == nil:
		return &kvcachedLease{cache: cache, size: kvcachedLeased(manager, cache), place: place, holders: map[*LlmRequest]bool{}}, nil
	case req.ctx.Err() != nil:
		return nil, req.ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return nil, kvcachedBusy(kvcachedName(req.model), "room for its "+kvcached.FormatSize(place.need.Total()), started)
	case errors.As(err, &limit) && limit.FitsAlone():
		return nil, kvcachedRetry{err} // others do not give way now
	}
	return nil, err
}

// kvcachedLeased is the size of the leases that a model holds; what it needs, where the ledger does not tell.
func kvcachedLeased(manager *kvcached.Manager, cache *kvcached.KVCache) uint64 {
	stats, err := manager.Stats()
	if err != nil {
		slog.Warn("kvcached: the ledger cannot be read", "error", err)
	}
	for _, stat := range stats {
		if stat.Model == cache.Model() {
			return stat.Lease
		}
	}
	return cache.Need().Total()
}

// take is the lease for the load that a request is about to begin; nil where there is none, or the request asks for more
// than it was taken for.
func (q *kvcachedQueues) take(key string, req *LlmRequest) *kvcachedLease {
	q.mu.Lock()
	lease := q.leases[key]
	delete(q.leases, key)
	fits := lease != nil && lease.place.serves(req)
	if fits {
		q.loading[key] = true
	}
	q.mu.Unlock()
	if fits {
		return lease
	}
	if lease != nil {
		lease.cache.Free()
	}
	return nil
}

// loaded notes that a load is over, whatever came of it.
func (q *kvcachedQueues) loaded(key string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.loading, key)
}

// kvcachedPatience bounds a wait by the time that a load may stall.
func kvcachedPatience(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, envconfig.LoadTimeout())
}

// keepAlive is how long the request's model is to stay after it.
func (req *LlmRequest) keepAlive() time.Duration {
	if req.sessionDuration != nil {
		return req.sessionDuration.Duration
	}
	return envconfig.KeepAlive()
}
