package server

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
	"github.com/ollama/ollama/ml"
)

// waiting is how many requests wait for a lease.
func (b *bench) waiting() int {
	b.Scheduler.kvcached.mu.Lock()
	defer b.Scheduler.kvcached.mu.Unlock()
	n := 0
	for _, requests := range b.Scheduler.kvcached.waiting {
		n += len(requests)
	}
	return n
}

// A model in use is not disturbed: another waits for its end, while requests for a third that fits go on.
func TestKVCachedAdmissionWaitsForItsRoom(t *testing.T) {
	b := newBench(t, 1.5)
	a := b.send("a", kvcachedModel(t))
	runner := a.must()
	second := b.send("b", kvcachedModel(t))
	b.until("b waits", func() bool { return b.waiting() == 1 })
	time.Sleep(50 * time.Millisecond)
	if len(second.success)+len(second.failure) > 0 || len(b.ledger.Commands()) > 0 {
		t.Fatalf("a model in use made room: %v", b.ledger.Commands())
	}
	a.finish(runner)
	second.must()
	if got := b.ledger.Commands(); !slices.Equal(got, []string{"sleep a:latest"}) {
		t.Errorf("%v", got)
	}
}

// A client that goes away while its model waits for room leaves no place, no lease and no handler; who comes after it
// for the same model is served.
func TestKVCachedCancelledAdmission(t *testing.T) {
	b := newBench(t, 1.5)
	first := b.send("a", kvcachedModel(t))
	runner := first.must()
	path := kvcachedModel(t)
	gone, stays := b.send("b", path), b.send("b", path)
	b.until("both wait", func() bool { return b.waiting() == 2 })
	gone.end()
	if _, err := gone.wait(); err == nil || err.Error() != "context canceled" {
		t.Errorf("the one that left: %v", err)
	}
	b.until("one waits", func() bool { return b.waiting() == 1 })
	first.finish(runner)
	stays.finish(stays.must())

	third := b.send("c", kvcachedModel(t))
	held := third.must()
	last := b.send("d", kvcachedModel(t))
	b.until("it waits", func() bool { return b.waiting() == 1 })
	last.end()
	if _, err := last.wait(); err == nil {
		t.Error("answered all the same")
	}
	third.finish(held)
	b.until("nothing is left", func() bool {
		b.Scheduler.kvcached.mu.Lock()
		defer b.Scheduler.kvcached.mu.Unlock()
		return len(b.Scheduler.kvcached.waiting) == 0 && len(b.Scheduler.kvcached.leases) == 0
	})
	if got := b.states(); len(got) != 3 {
		t.Errorf("leases: %v", got)
	}
}

// A lease whose requests have all gone before a runner was created goes back.
func TestKVCachedUnusedLease(t *testing.T) {
	b := newBench(t, 2.5)
	block, busy := make(chan struct{}), make(chan struct{})
	pause := func() { close(busy); <-block }
	b.pause.Store(&pause)
	second := b.send("b", kvcachedModel(t))
	<-busy // the scheduler's loop is about to load it
	if slots, _ := b.ledger.Slots(); len(slots) != 1 {
		t.Fatalf("%+v", slots)
	}
	second.end()
	b.until("the lease is back", func() bool { slots, _ := b.ledger.Slots(); return len(slots) == 0 })
	b.pause.Store(nil)
	close(block)
	if err := b.ask("a", kvcachedModel(t)); err != nil {
		t.Fatal(err)
	}
	if got := b.runners(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("%v", got)
	}
}

// Requests for one model are served in order of arrival, also where one of them has to go back for a lease.
func TestKVCachedOrder(t *testing.T) {
	s := &Scheduler{pendingReqCh: make(chan *LlmRequest, 8)}
	var sent []*LlmRequest
	for i := range 4 {
		req := &LlmRequest{ctx: t.Context(), model: &Model{ModelPath: "m"}, errCh: make(chan error, 1)}
		req.kvcached.order = uint64(i + 1)
		sent = append(sent, req)
	}
	s.loaded = map[string]*runnerRef{}
	s.kvcached.mu.Lock()
	for _, i := range []int{2, 0, 3, 1} {
		s.kvcachedWait(sent[i])
	}
	s.kvcached.leases["m"] = &kvcachedLease{holders: map[*LlmRequest]bool{}}
	s.kvcached.mu.Unlock()
	for i, want := range sent {
		select {
		case got := <-s.pendingReqCh:
			if got != want {
				t.Errorf("in place %d: request %d", i, got.kvcached.order)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a request is not passed on")
		}
	}
}

func TestKVCachedFullQueue(t *testing.T) {
	t.Setenv("OLLAMA_MAX_QUEUE", "2")
	b := newBench(t, 1.5)
	a := b.send("a", kvcachedModel(t))
	runner := a.must()
	second, third := b.send("b", kvcachedModel(t)), b.send("c", kvcachedModel(t))
	b.until("two wait", func() bool { return b.waiting() == 2 })
	if _, err := b.send("d", kvcachedModel(t)).wait(); !errors.Is(err, ErrMaxQueue) {
		t.Errorf("%v", err)
	}
	a.finish(runner)
	second.finish(second.must())
	third.must()
}

// Nobody waits for longer than a load may stall, and the answer is one that clients repeat.
func TestKVCachedPatience(t *testing.T) {
	t.Setenv("OLLAMA_LOAD_TIMEOUT", "100ms")
	b := newBench(t, 1.5)
	b.send("a", kvcachedModel(t)).must()
	_, err := b.send("b", kvcachedModel(t)).wait()
	if !errors.Is(err, ErrMaxQueue) || !strings.Contains(err.Error(), "b:latest waited") || llm.IsOutOfMemory(err) {
		t.Errorf("%v", err)
	}
	answer := httptest.NewRecorder()
	c, _ := gin.CreateTestContext(answer)
	handleScheduleError(c, "b", err)
	if answer.Code != http.StatusServiceUnavailable || !strings.Contains(answer.Body.String(), "please try again") {
		t.Errorf("%d %s", answer.Code, answer.Body)
	}
}

// Requests that come while their model is on its way use it, and take no second lease.
func TestKVCachedRequestsForALoadingModel(t *testing.T) {
	b := newBench(t, 1.5)
	block, loading := make(chan struct{}), make(chan struct{})
	loads := 0
	b.change = func(c *child) {
		loads++
		c.loading = func() { close(loading); <-block }
	}
	path := kvcachedModel(t)
	first := b.send("a", path)
	<-loading
	others := []*request{}
	for range 3 {
		others = append(others, b.send("a", path))
	}
	close(block)
	runner := first.must()
	for _, r := range others {
		if r.must() != runner {
			t.Error("another runner")
		}
	}
	if slots, _ := b.ledger.Slots(); len(slots) != 1 || loads != 1 {
		t.Errorf("%d loads, %+v", loads, slots)
	}
}

// A change of options that needs a reload unloads first, and is admitted anew.
func TestKVCachedReload(t *testing.T) {
	b := newBench(t, 1.5)
	path := kvcachedModel(t)
	if err := b.ask("a", path); err != nil {
		t.Fatal(err)
	}
	if err := b.ask("a", path, numCtx(4096)); err != nil {
		t.Fatal(err)
	}
	slots, _ := b.ledger.Slots()
	if len(slots) != 1 || slots[0].Index != 2 || len(b.ledger.Commands()) != 0 {
		t.Errorf("%+v, %v", slots, b.ledger.Commands())
	}
}

// Models of Ollama's other engine, and those on GPUs without elastic memory, are loaded as in stock.
func TestKVCachedUnmanaged(t *testing.T) {
	b := newBench(t, 1.5)
	b.gpus = []ml.DeviceInfo{{DeviceID: ml.DeviceID{ID: "0", Library: "Vulkan"}, Name: "Vulkan0", TotalMemory: 64 << 30, FreeMemory: 64 << 30}}
	if err := b.ask("a", kvcachedModel(t)); err != nil {
		t.Fatal(err)
	}
	if got := b.states(); len(got) != 0 {
		t.Errorf("%v", got)
	}
	if s := b.Scheduler; s.kvcachedQueue(&LlmRequest{model: &Model{Digest: "x"}}) {
		t.Error("a model without a file was queued")
	}
	models := []api.ProcessModelResponse{{Name: "a:latest"}}
	(&Server{sched: b.Scheduler}).kvcachedAnnotate(models)
	if models[0].KVCached == nil || models[0].KVCached.State != "unmanaged" {
		t.Errorf("%+v", models[0].KVCached)
	}
	// On the CPU the same model is managed.
	if err := b.ask("b", kvcachedModel(t), func(o *api.Options, _ **api.Duration) { o.NumGPU = 0 }); err != nil {
		t.Fatal(err)
	}
	if got := b.states(); got["b"] != kvcached.StateAwake {
		t.Errorf("%v", got)
	}
}
