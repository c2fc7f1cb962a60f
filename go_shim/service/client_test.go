package service

import (
	"context"
	"errors"
	"testing"

	"kvpatch.dev/shim/kvcached"
)

// Ollama's side of the socket, with the real service behind it.
func TestOllamasClient(t *testing.T) {
	w := newWorld(t, 10*mb)
	c := kvcached.NewClient(w.socket, "")
	ctx, cancel := context.WithCancel(context.Background())
	seen := make(chan *kvcached.ServiceStats, 100)
	done := make(chan struct{})
	go func() { defer close(done); c.Follow(ctx, func(s *kvcached.ServiceStats) { seen <- s }) }()
	defer func() { cancel(); <-done; c.Close() }()
	first := <-seen
	if d := first.Devices[0]; d.Device != "host" || d.Limit != 10*mb || d.Charge != 0 || d.Revision != 1 || !d.Same("/dev/null") || first.Version != "fake" {
		t.Errorf("%+v", first)
	}
	lease, err := c.Allocate(within(t), kvcached.ServiceRequest{Size: 6 * mb, Model: "a", Fixed: mb})
	if err != nil || lease.Slot == 0 || w.charged() != 6*mb {
		t.Fatal(lease, err)
	}
	for s := first; s.Devices[0].Charge != 6*mb; s = <-seen { // long before the next message is due
	}
	_, err = c.Allocate(within(t), kvcached.ServiceRequest{Size: 5 * mb})
	if !errors.Is(err, kvcached.ErrLimit) {
		t.Error(err)
	}
	_, err = c.Allocate(within(t), kvcached.ServiceRequest{})
	var refused *kvcached.ServiceError
	if !errors.As(err, &refused) || refused.Code != "invalid_argument" || errors.Is(err, kvcached.ErrLimit) {
		t.Error(err)
	}
	limit, err := c.SetLimit(within(t), "", "", 4*mb)
	if err != nil || limit.Bytes != 4*mb || limit.Overage != 2*mb || limit.Revision != 2 {
		t.Error(limit, err)
	}
	if err := lease.Free(); err != nil || w.charged() != 0 {
		t.Error(err)
	}
	if _, err := c.Allocate(within(t), kvcached.ServiceRequest{Size: mb}); err != nil {
		t.Fatal(err)
	}
	c.Close()
	w.eventually("what it held has gone with it", func() bool { return w.charged() == 0 })
}
