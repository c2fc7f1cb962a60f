package kvcached

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// apart is a service with a ledger of its own for host memory, with a limit, in which others are charged some of it.
type apart struct {
	*fakeService
	limit  int
	others atomic.Int64
	file   string
}

func newApart(t *testing.T, limit, others int) *apart {
	a := &apart{fakeService: newFakeService(t), limit: limit, file: "1:2"}
	a.others.Store(int64(others))
	a.answer = func(method string, request map[string]any) (int, any) {
		switch method {
		case "Allocate":
			if request["device"] != "host" || request["group"] != nil {
				t.Errorf("a budget in another place: %v", request)
			}
			if size := sizeOf(request["size"]); a.charged()+int(a.others.Load())+size > a.limit {
				return 429, map[string]any{"code": "resource_exhausted", "reason": "KVCACHED_E_LIMIT", "message": "full"}
			}
		case "WatchStats":
			return 200, map[string]any{"devices": []any{map[string]any{
				"device": "host", "ledger": "/other", "ledger_file": a.file, "limit": text(a.limit), "charge": text(int(a.others.Load()) + a.charged()), "overage": "0",
			}}}
		}
		return 0, nil
	}
	return a
}

// open is a manager that has heard from the service, where somebody serves it.
func (a *apart) open(t *testing.T, limit uint64, heard bool) (*Manager, *fakeLedger) {
	t.Helper()
	m, l := fakeManagerWith(t, Settings{Enabled: true, Limit: limit, Source: "a test", Socket: a.socket, Sleep: time.Hour})
	if heard {
		comesTrue(t, "the service was heard", func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.host.budget.device == "host"
		})
	}
	return m, l
}

func admit(t *testing.T, m *Manager, name string, size uint64, patience time.Duration) (*KVCache, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return m.Admit(ctx, Request{Model: name, Need: Need{Weights: size}, Whole: true})
}

func TestBudgetFollowsTheCharge(t *testing.T) {
	a := newApart(t, 6400, 1000)
	a.start()
	m, l := a.open(t, NoLimit, true)

	c, err := admit(t, m, "m", 3000, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if got := a.charged(); got != 3000 {
		t.Errorf("charged at the service before the child starts: %d", got)
	}
	l.set(c.Slot(), func(s *Slot) { s.Claim, s.Charge = 4050, 4050 }) // it has grown
	comesTrue(t, "growth is charged, in hundreds", func() bool { return a.charged() == 4100 })
	l.set(c.Slot(), func(s *Slot) { s.Claim, s.Charge, s.Lease = 10, 10, 0 }) // it has gone to sleep
	comesTrue(t, "a sleep is given back", func() bool { return a.charged() == 100 })
	for charge := uint64(100); charge <= 2000; charge += 100 {
		l.set(c.Slot(), func(s *Slot) { s.Charge = charge })
		if err := m.host.cover(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(m.host.budget.leases); n > budgetLeases || a.charged() != 2000 {
		t.Errorf("%d leases of %d bytes", n, a.charged())
	}
	c.Free()
	comesTrue(t, "all is given back", func() bool { return a.charged() == 0 })
}

func TestBudgetIsBound(t *testing.T) {
	a := newApart(t, 5000, 2000)
	a.start()
	m, l := a.open(t, NoLimit, true)

	// Not even alone.
	var limit *LimitError
	if _, err := admit(t, m, "big", 5001, 10*time.Second); !errors.As(err, &limit) || limit.FitsAlone() || limit.Limit != 5000 {
		t.Errorf("%v", err)
	}
	// Beside others: it waits, as long as its request does, for they may end.
	if _, err := admit(t, m, "later", 3001, 1500*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	// The service has less than it said: the lease is given back, and another try comes.
	a.others.Store(2500)
	if _, err := admit(t, m, "late", 2600, 1500*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if slots, _ := l.Slots(); len(slots) != 0 || a.charged() != 0 {
		t.Errorf("left: %v, %d", slots, a.charged())
	}
	if _, err := admit(t, m, "small", 2500, 10*time.Second); err != nil || a.charged() != 2500 {
		t.Errorf("%v, %d", err, a.charged())
	}
}

// With one ledger for both, the service's limit is in it.
func TestNoBudgetInTheSameLedger(t *testing.T) {
	a := newApart(t, 5000, 2000)
	path := filepath.Join(t.TempDir(), "ledger")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.file = fileID(path)
	a.start()
	l := newFakeLedger(path)
	m, err := Open(Settings{Enabled: true, Limit: NoLimit, Socket: a.socket}, &fakeLibrary{ledger: l}, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFake(m, l) })
	comesTrue(t, "connected", func() bool { return a.ticks.Load() > 0 })
	time.Sleep(50 * time.Millisecond)
	if _, err := admit(t, m, "m", 4000, 10*time.Second); err != nil || a.charged() != 0 {
		t.Errorf("%v, %d", err, a.charged())
	}
}

// lines is a log that is read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

func TestServiceDownIsSaidOnceAndGoesOnByTheLedger(t *testing.T) {
	log := &lines{}
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.NewTextHandler(log, nil)))
	a := newApart(t, 5000, 2000)
	m, l := a.open(t, 4000, false)

	comesTrue(t, "it is said", func() bool { return log.count("no service") == 1 })
	c, err := admit(t, m, "m", 4000, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(1200 * time.Millisecond) // it was tried again
	if n := log.count("no service"); n != 1 {
		t.Errorf("said %d times", n)
	}

	// It comes up, and has less than is in use: that stays in use, and is said.
	a.start()
	comesTrue(t, "connected", func() bool { return log.count("connected to the service") == 1 })
	comesTrue(t, "there is no room for it", func() bool { return log.count("does not count all that is in use") == 1 })
	if slots, _ := l.Slots(); len(slots) != 1 || a.charged() != 0 {
		t.Errorf("%v, %d", slots, a.charged())
	}
	l.set(c.Slot(), func(s *Slot) { s.Lease, s.Charge = 0, 1000 })
	comesTrue(t, "what is left is charged", func() bool { return a.charged() >= 1000 })

	a.stop()
	comesTrue(t, "it is said anew", func() bool { return log.count("no service") == 2 })
	c.Free()
	if _, err := admit(t, m, "n", 100, 10*time.Second); err != nil {
		t.Errorf("with the service gone: %v", err)
	}
}

func TestSettingsWithoutASocketConnectNowhere(t *testing.T) {
	m, _ := fakeManager(t, 10)
	if m.service != nil {
		t.Error("a client without a socket")
	}
	if err := m.NewKVCache("m", Need{Weights: 10}).Allocate(10); err != nil {
		t.Error(err)
	}
}

// Sizes in the service's JSON are strings.
func sizeOf(v any) (n int) {
	n, _ = strconv.Atoi(v.(string))
	return n
}

func text(n int) string { return strconv.Itoa(n) }
