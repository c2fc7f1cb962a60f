package service

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvpatch.dev/shim/kvcached"
)

// holder is a connection, which holds the budgets asked for on it.
type holder struct {
	peer   Peer
	number uint64 // of the connections since the start
	ended  bool   // protected by the table's mu
}

func (h *holder) String() string {
	return fmt.Sprintf("connection %d (user %d, process %d)", h.number, h.peer.UID, h.peer.PID)
}

type holderKey struct{}

func withHolder(ctx context.Context, h *holder) context.Context {
	return context.WithValue(ctx, holderKey{}, h)
}

func holderOf(ctx context.Context) (*holder, error) {
	h, ok := ctx.Value(holderKey{}).(*holder)
	if !ok {
		return nil, status.Error(codes.Internal, "the request came by no connection that is known")
	}
	return h, nil
}

// lease is a budget: a lease in a ledger, taken for a holder.
type lease struct {
	holder *holder
	ledger kvcached.Ledger
	device string
	slot   int
	size   uint64
	name   string
}

// drop gives the lease back to the ledger. A lease that the ledger does not take back stays charged until the service ends.
func (l *lease) drop(why string) {
	if err := l.ledger.Unlease(l.slot); err != nil {
		slog.Error("a budget cannot be given back", "device", l.device, "slot", l.slot, "model", l.name, "error", err)
		return
	}
	slog.Info("budget given back", "device", l.device, "model", l.name, "size", kvcached.FormatSize(l.size), "holder", l.holder, "why", why)
}

// table has the leases of all holders. Ledgers are called without its lock.
type table struct {
	mu      sync.Mutex
	most    int
	pending int // asked of a ledger, not there yet
	last    int64
	held    map[int64]*lease
}

// begin makes sure of a place for one more lease; cancel or add follows.
func (t *table) begin() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.held)+t.pending >= t.most {
		return status.Errorf(codes.ResourceExhausted, "the service holds %d budgets, and holds no more", t.most)
	}
	t.pending++
	return nil
}

func (t *table) cancel() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending--
}

// add gives the lease its handle. It fails where the holder has ended: nobody would give it back.
func (t *table) add(l *lease) (int64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending--
	if l.holder.ended {
		return 0, status.Error(codes.Canceled, "the connection has ended")
	}
	t.last++
	t.held[t.last] = l
	return t.last, nil
}

// take removes a lease of this holder; nil if there is none.
func (t *table) take(h *holder, handle int64) *lease {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.held[handle]
	if l == nil || l.holder != h {
		return nil
	}
	delete(t.held, handle)
	return l
}

// end drops everything of a holder, once and for all.
func (t *table) end(h *holder) {
	t.mu.Lock()
	h.ended = true
	var dropped []*lease
	for handle, l := range t.held {
		if l.holder == h {
			dropped = append(dropped, l)
			delete(t.held, handle)
		}
	}
	t.mu.Unlock()
	for _, l := range dropped {
		l.drop("its holder has gone")
	}
}

// slots are those of the leases in a ledger.
func (t *table) slots(ledger kvcached.Ledger) map[int]bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	found := map[int]bool{}
	for _, l := range t.held {
		if l.ledger == ledger {
			found[l.slot] = true
		}
	}
	return found
}

func (t *table) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.held)
}
