package service

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"kvpatch.dev/shim/kvcached"
	pb "kvpatch.dev/shim/proto"
)

const (
	defaultInterval = time.Second
	minInterval     = 100 * time.Millisecond // also the least time between two messages of a stream
	maxInterval     = time.Minute
)

// GetStats says what is charged where.
func (s *Service) GetStats(ctx context.Context, req *pb.StatsRequest) (*pb.StatsResponse, error) {
	devices, err := s.selected(req)
	if err != nil {
		return nil, err
	}
	answer := &pb.StatsResponse{
		Version: s.library.Version(), Leases: int32(s.leases.count()), Connections: connectionsOf(ctx),
	}
	for _, d := range devices {
		shown, err := s.show(d)
		if err != nil {
			return nil, failure(err)
		}
		answer.Devices = append(answer.Devices, shown)
	}
	fit(answer)
	return answer, nil
}

// WatchStats is the stream of gRPC; the one of JSON calls watch, too.
func (s *Service) WatchStats(req *pb.StatsRequest, stream grpc.ServerStreamingServer[pb.StatsResponse]) error {
	return s.watch(stream.Context(), req, stream.Send)
}

// watch sends what GetStats says: at once, after changes, and after each interval without one.
func (s *Service) watch(ctx context.Context, req *pb.StatsRequest, send func(*pb.StatsResponse) error) error {
	interval := time.Duration(req.GetIntervalMs()) * time.Millisecond
	switch {
	case interval == 0:
		interval = defaultInterval
	case interval < minInterval || interval > maxInterval:
		return status.Errorf(codes.InvalidArgument, "interval_ms %d: it is 0 or from %d to %d", req.GetIntervalMs(), minInterval.Milliseconds(), maxInterval.Milliseconds())
	}
	devices, err := s.selected(req)
	if err != nil {
		return err
	}
	rung := make(chan struct{}, 1)
	for _, d := range devices {
		d.bell.add(rung, d)
		defer d.bell.remove(rung)
	}
	for {
		answer, err := s.GetStats(ctx, req)
		if err != nil {
			return err
		}
		if err := send(answer); err != nil {
			return err
		}
		if err := pause(ctx, minInterval, nil); err != nil {
			return err
		}
		if err := pause(ctx, interval-minInterval, rung); err != nil {
			return err
		}
	}
}

// pause ends after d, or when something comes through early.
func pause(ctx context.Context, d time.Duration, early <-chan struct{}) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-timer.C:
	case <-early:
	}
	return nil
}

func (s *Service) selected(req *pb.StatsRequest) ([]*device, error) {
	if req.GetDevice() == "" {
		return s.devices, nil
	}
	d, err := s.device(req.GetDevice())
	if err != nil {
		return nil, err
	}
	return []*device{d}, nil
}

func (s *Service) show(d *device) (*pb.Device, error) {
	ledger := d.current()
	limit, err := ledger.Limit("")
	if err != nil {
		return nil, err
	}
	slots, err := ledger.Slots()
	if err != nil {
		return nil, err
	}
	shown := &pb.Device{
		Device: d.ID, Ledger: ledger.Path(), LedgerFile: fileID(ledger.Path()),
		Limit: signed(limit.Bytes), Charge: signed(limit.Charge), Overage: signed(limit.Overage), Revision: limit.Revision,
	}
	here, now := s.leases.slots(ledger), s.library.Monotonic()
	for _, slot := range slots {
		shown.Slots = append(shown.Slots, showSlot(&slot, now, here[slot.Index]))
	}
	return shown, nil
}

func showSlot(s *kvcached.Slot, now time.Duration, here bool) *pb.Slot {
	unused := int64(-1)
	if s.LastUse != 0 {
		unused = max(now-s.LastUse, 0).Milliseconds()
	}
	return &pb.Slot{
		Slot: int32(s.Index), Pid: s.PID, Name: strings.ToValidUTF8(s.Name, "?"), Group: strings.ToValidUTF8(s.Group, "?"),
		Charge: signed(s.Charge), Lease: signed(s.Lease), Fixed: signed(s.Fixed), Claim: signed(s.Claim),
		KvMapped: signed(s.KV), WeightsMapped: signed(s.Weights), ComputeMapped: signed(s.Compute),
		KvReserved: signed(s.KindReserved[kvcached.KindKV]), ContextBytes: signed(s.Context),
		Idle: signed(s.Idle), Pooled: signed(s.Pooled), Asleep: signed(s.Asleep), HostBytes: signed(s.HostBytes),
		Wants: signed(s.Wants), Limit: signed(s.Limit), UnusedMs: unused,
		Inside: int32(s.Inside), Queued: int32(s.Queued), Parked: int32(s.Parked),
		Leased: s.Leased, Attached: s.Attached, Controlled: s.Controlled, HeldHere: here,
	}
}

// fileID tells files of one path apart: containers may each have a /dev/shm of their own.
func fileID(path string) string {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// fit leaves out slots, from the longest list, until the answer is within the bound; JSON is the longer form of the two.
func fit(answer *pb.StatsResponse) {
	for {
		text, err := jsonOut.Marshal(answer)
		if err != nil || len(text) < MaxMessage {
			return // an error comes up again where the answer is written
		}
		longest := answer.Devices[0]
		for _, d := range answer.Devices {
			if len(d.Slots) > len(longest.Slots) {
				longest = d
			}
		}
		if len(longest.Slots) == 0 {
			return
		}
		keep := len(longest.Slots) * 3 / 4
		longest.SlotsLeftOut += int32(len(longest.Slots) - keep)
		longest.Slots = longest.Slots[:keep]
	}
}

var jsonOut = protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}

// bell hands a ledger's bell on to those who watch. Its goroutine runs while there is one.
type bell struct {
	mu       sync.Mutex
	watchers map[chan struct{}]struct{}
}

func (b *bell) add(c chan struct{}, d *device) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.watchers == nil {
		b.watchers = map[chan struct{}]struct{}{}
		go b.listen(d)
	}
	b.watchers[c] = struct{}{}
}

func (b *bell) remove(c chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.watchers, c)
}

// over says whether nobody is left, and that the goroutine ends then.
func (b *bell) over() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.watchers) > 0 {
		return false
	}
	b.watchers = nil
	return true
}

func (b *bell) listen(d *device) {
	var seen uint32
	for !b.over() {
		now, err := d.current().Wait(seen, time.Second)
		if err != nil {
			// Streams still come once an interval.
			slog.Warn("the ledger's bell cannot be heard", "device", d.ID, "error", err)
			time.Sleep(time.Second)
			continue
		}
		if now != seen {
			b.ring() // the first time, too: it may have rung since the watcher's look
		}
		seen = now
	}
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.watchers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}
