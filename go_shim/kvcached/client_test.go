package kvcached

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fakeService answers as kvcachedd does, as far as a test says; kvcachedd's own tests have the real one.
type fakeService struct {
	*testing.T
	socket string
	answer func(method string, request map[string]any) (int, any)

	mu     sync.Mutex
	server *http.Server
	held   map[string]int // handle: size
	ticks  atomic.Int32   // connections that a stream was asked for on
}

func newFakeService(t *testing.T) *fakeService {
	if runtime.GOOS != "linux" {
		t.Skip("the service is for Linux")
	}
	f := &fakeService{T: t, socket: filepath.Join(t.TempDir(), "s"), held: map[string]int{}}
	t.Cleanup(f.stop)
	return f
}

func (f *fakeService) start() {
	f.Helper()
	listener, err := net.Listen("unix", f.socket)
	if err != nil {
		f.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = map[string]int{}
	f.server = &http.Server{Handler: f}
	go func(s *http.Server) { _ = s.Serve(listener) }(f.server)
}

// stop ends the service as a kill does: every connection is closed.
func (f *fakeService) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.server != nil {
		_ = f.server.Close()
	}
}

func (f *fakeService) charged() (sum int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, size := range f.held {
		sum += size
	}
	return sum
}

func (f *fakeService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var request map[string]any
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
		f.Errorf("%s: %v", r.URL, err)
	}
	method := strings.TrimPrefix(r.URL.Path, servicePath)
	status, value := http.StatusOK, any(nil)
	if f.answer != nil {
		status, value = f.answer(method, request)
	}
	if value == nil {
		status, value = f.usual(method, request)
	}
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(value)
	if method == "WatchStats" && status == http.StatusOK {
		f.ticks.Add(1)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
}

func (f *fakeService) usual(method string, request map[string]any) (int, any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch method {
	case "Allocate":
		var size int
		_, _ = fmt.Sscan(request["size"].(string), &size)
		handle := fmt.Sprint(len(f.held) + 1)
		f.held[handle] = size
		return 200, map[string]any{"handle": handle, "gpu_ptr": "0", "slot": 3, "ledger": "/l", "group": "service-1"}
	case "Free":
		if _, there := f.held[request["handle"].(string)]; !there {
			return 404, map[string]any{"code": "not_found", "message": "none"}
		}
		delete(f.held, request["handle"].(string))
		return 200, map[string]any{}
	case "SetLimit":
		return 200, map[string]any{"bytes": request["bytes"], "charge": "5", "overage": "0", "revision": 7}
	}
	return 200, map[string]any{"devices": []any{map[string]any{"device": "host", "ledger": "/l", "limit": "-1", "charge": "0", "overage": "0"}}, "leases": len(f.held)}
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func comesTrue(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never came true: %s", what)
		}
	}
}

func TestClientCalls(t *testing.T) {
	f := newFakeService(t)
	f.start()
	c := NewClient(f.socket, "")
	defer c.Close()
	lease, err := c.Allocate(bounded(t), ServiceRequest{Size: 10, Model: "m"})
	if err != nil || lease.Slot != 3 || lease.Ledger != "/l" || lease.Group != "service-1" || f.charged() != 10 {
		t.Fatal(lease, err, f.charged())
	}
	stats, err := c.Stats(bounded(t))
	if err != nil || stats.Leases != 1 || stats.Devices[0].Limit != -1 {
		t.Error(stats, err)
	}
	for bytes, want := range map[uint64]uint64{NoLimit: NoLimit, 0: 0, 9: 9} {
		if limit, err := c.SetLimit(bounded(t), "", "", bytes); err != nil || limit.Bytes != want || limit.Charge != 5 || limit.Revision != 7 {
			t.Error(limit, err)
		}
	}
	if err := errors.Join(lease.Free(), lease.Free()); err != nil || f.charged() != 0 {
		t.Error(err, f.charged())
	}
}

func TestClientErrors(t *testing.T) {
	f := newFakeService(t)
	c := NewClient(f.socket, "")
	defer c.Close()
	_, err := c.Allocate(bounded(t), ServiceRequest{Size: 1})
	var down *ServiceDown
	if !errors.As(err, &down) || !errors.Is(err, os.ErrNotExist) || strings.Count(err.Error(), f.socket) != 1 {
		t.Fatal(err)
	}
	f.answer = func(method string, request map[string]any) (int, any) {
		return 429, map[string]any{"code": "resource_exhausted", "reason": "KVCACHED_E_LIMIT", "message": "no room"}
	}
	f.start()
	_, err = c.Allocate(bounded(t), ServiceRequest{Size: 1})
	var refused *ServiceError
	if !errors.As(err, &refused) || !errors.Is(err, ErrLimit) || errors.Is(err, ErrBusy) || errors.As(err, &down) {
		t.Fatal(err)
	}
	// Whatever else answers there is not the service, and a call to it has not been carried through.
	for _, answer := range []any{"text", map[string]any{"error": "what?"}} {
		f.answer = func(string, map[string]any) (int, any) { return 500, answer }
		if _, err = c.Stats(bounded(t)); !errors.As(err, &down) || !strings.Contains(err.Error(), "500") {
			t.Error(err)
		}
	}
	f.answer = func(string, map[string]any) (int, any) { return 200, map[string]any{"devices": "x"} }
	if _, err = c.Stats(bounded(t)); !errors.As(err, &down) {
		t.Error(err)
	}
	// One that hangs costs as long as the caller gives it.
	hang := make(chan struct{})
	f.answer = func(string, map[string]any) (int, any) { <-hang; return 200, nil }
	defer close(hang)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err = c.Stats(ctx); !errors.As(err, &down) {
		t.Error(err)
	}
}

// The service is killed and started again: budgets that were held are held again, those freed meanwhile are not; the log has
// one line for each turn.
func TestClientFollows(t *testing.T) {
	f := newFakeService(t)
	var text bytes.Buffer
	var mu sync.Mutex
	before := slog.Default()
	defer slog.SetDefault(before)
	slog.SetDefault(slog.New(slog.NewTextHandler(logWriter(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return text.Write(p)
	}), nil)))
	said := func(what string) int {
		mu.Lock()
		defer mu.Unlock()
		return strings.Count(text.String(), what)
	}
	const down, up = "going on with the ledger alone", "connected to the service"

	c := NewClient(f.socket, "")
	defer c.Close()
	ctx, cancel := context.WithCancel(context.Background())
	var seen atomic.Int32
	done := make(chan struct{})
	go func() { defer close(done); c.Follow(ctx, func(*ServiceStats) { seen.Add(1) }) }()
	defer func() { cancel(); <-done }()

	comesTrue(t, "the start without a service is said", func() bool { return said(down) == 1 })
	f.start()
	comesTrue(t, "it is found", func() bool { return said(up) == 1 && seen.Load() > 0 })
	first, err := c.Allocate(bounded(t), ServiceRequest{Size: 10, Model: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Allocate(bounded(t), ServiceRequest{Size: 20, Model: "b"}); err != nil {
		t.Fatal(err)
	}
	f.stop()
	comesTrue(t, "the loss is said", func() bool { return said(down) == 2 })
	if err := first.Free(); err != nil {
		t.Error("freeing while the service is down:", err)
	}
	time.Sleep(2500 * time.Millisecond) // several tries
	if said(down) != 2 || said(up) != 1 {
		t.Errorf("said more than once:\n%s", text.String())
	}
	f.start()
	comesTrue(t, "it is found again", func() bool { return said(up) == 2 })
	if f.charged() != 20 {
		t.Errorf("%d bytes are held again", f.charged())
	}
}

type logWriter func([]byte) (int, error)

func (w logWriter) Write(p []byte) (int, error) { return w(p) }

// A budget for which there is no room after a restart is tried again with the next call.
func TestClientTakesBudgetsAgain(t *testing.T) {
	f := newFakeService(t)
	f.start()
	c := NewClient(f.socket, "")
	defer c.Close()
	if _, err := c.Allocate(bounded(t), ServiceRequest{Size: 10}); err != nil {
		t.Fatal(err)
	}
	f.stop()
	f.answer = func(method string, _ map[string]any) (int, any) {
		if method == "Allocate" {
			return 429, map[string]any{"code": "resource_exhausted", "message": "no room"}
		}
		return 200, nil
	}
	f.start()
	if _, err := c.Stats(bounded(t)); err != nil || f.charged() != 0 {
		t.Error(err, f.charged())
	}
	f.answer = nil
	if _, err := c.Stats(bounded(t)); err != nil || f.charged() != 10 {
		t.Error(err, f.charged())
	}
}

func TestSameLedger(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the service is for Linux")
	}
	path := filepath.Join(t.TempDir(), "l")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := ServiceDevice{File: fileID(path)}
	if !d.Same(path) || d.Same(path+"x") || d.Same(t.TempDir()) || (ServiceDevice{}).Same(path+"x") {
		t.Error(d)
	}
}
