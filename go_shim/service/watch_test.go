package service

import (
	"bufio"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"kvpatch.dev/shim/kvcached"
	pb "kvpatch.dev/shim/proto"
)

func TestStats(t *testing.T) {
	w := newWorld(t, 10*mb)
	c, _ := w.grpc()
	taken, err := c.Allocate(within(t), &pb.AllocRequest{Size: 4 * mb, Fixed: mb, ModelId: "mine", Group: "g"})
	if err != nil || taken.Group != "g" {
		t.Fatal(taken, err)
	}
	w.ledger.mu.Lock()
	w.ledger.slots = append(w.ledger.slots, kvcached.Slot{
		Index: 77, PID: 5, Name: "oth\xffer", Group: "o", Charge: 7 * mb, Fixed: mb, Claim: 6 * mb, KV: mb, Weights: 2 * mb, Compute: 3 * mb,
		KindReserved: [3]uint64{9 * mb, 8 * mb, 7 * mb}, Context: mb, Limit: kvcached.NoLimit, LastUse: time.Hour - 2*time.Second,
		Inside: 1, Queued: 2, Parked: 3, Attached: true, Controlled: true, Wants: 4, HostBytes: 5, Asleep: 6,
	})
	w.ledger.mu.Unlock()
	stats, err := c.GetStats(within(t), &pb.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	d := stats.Devices[0]
	if len(stats.Devices) != 1 || stats.Version != "fake" || stats.Leases != 1 || stats.Connections != 1 || d.Device != "host" ||
		d.Limit != 10*mb || d.Charge != 11*mb || d.Overage != mb || d.Revision != 1 || d.LedgerFile == "" || len(d.Slots) != 2 {
		t.Errorf("%v", stats)
	}
	mine, other := d.Slots[0], d.Slots[1]
	if mine.Name != "mine" || mine.Group != "g" || mine.Lease != 4*mb || mine.Fixed != mb || !mine.Leased || !mine.HeldHere || mine.UnusedMs != -1 {
		t.Errorf("%v", mine)
	}
	if other.Name != "oth?er" || other.HeldHere || other.Claim != 6*mb || other.KvMapped != mb || other.WeightsMapped != 2*mb || other.ComputeMapped != 3*mb ||
		other.KvReserved != 9*mb || other.ContextBytes != mb || other.Limit != -1 || other.UnusedMs != 2000 || other.Parked != 3 || other.Wants != 4 ||
		other.Inside != 1 || other.Queued != 2 || other.HostBytes != 5 || other.Asleep != 6 || !other.Controlled || !other.Attached {
		t.Errorf("%v", other)
	}
}

// Many processes with long names do not make a message that is too large: who is not listed is counted.
func TestStatsStayWithinABound(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	w.ledger.mu.Lock()
	for i := range 512 {
		w.ledger.slots = append(w.ledger.slots, kvcached.Slot{Index: i, Name: strings.Repeat("\x01", 63), Limit: kvcached.NoLimit})
	}
	w.ledger.mu.Unlock()
	c, _ := w.grpc()
	stats, err := c.GetStats(within(t), &pb.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	d := stats.Devices[0]
	if len(d.Slots) < 20 || len(d.Slots)+int(d.SlotsLeftOut) != 512 {
		t.Errorf("%d slots listed, %d left out", len(d.Slots), d.SlotsLeftOut)
	}
	if code, answer := w.wire().call("GetStats", `{"device": "host"}`); code != 200 || len(answer["devices"].([]any)) != 1 {
		t.Error(code)
	}
}

// A change is told long before the interval is over; and without a change the interval holds.
func TestWatchByGRPC(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	c, _ := w.grpc()
	stream, err := c.WatchStats(within(t), &pb.StatsRequest{IntervalMs: 60000})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || first.Leases != 0 {
		t.Fatal(first, err)
	}
	other, conn := w.grpc()
	if _, err := other.Allocate(within(t), &pb.AllocRequest{Size: mb}); err != nil {
		t.Fatal(err)
	}
	for now := first; now.Devices[0].Charge != mb; {
		if now, err = stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	_ = conn.Close()
	for now := first; ; {
		if now, err = stream.Recv(); err != nil {
			t.Fatal(err)
		}
		if now.Leases == 0 && now.Connections == 1 {
			break
		}
	}
	bad, err := c.WatchStats(within(t), &pb.StatsRequest{IntervalMs: 5})
	if err == nil {
		_, err = bad.Recv()
	}
	wantCode(t, err, codes.InvalidArgument, "interval_ms")
}

func TestWatchByJSON(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	wire := w.wire()
	answer := wire.send("WatchStats", []byte(`{"interval_ms": 100}`))
	if answer.StatusCode != 200 || answer.Header.Get("Content-Type") != "application/x-ndjson" {
		t.Fatal(answer)
	}
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, 2*MaxMessage)
	for range 3 {
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		var stats struct {
			Devices []struct{ Device, Charge string }
		}
		if err := json.Unmarshal(lines.Bytes(), &stats); err != nil || stats.Devices[0].Device != "host" || stats.Devices[0].Charge != "0" {
			t.Fatalf("%v: %s", err, lines.Bytes())
		}
	}
	_ = wire.conn.Close()
	w.eventually("the stream has ended", func() bool { return w.server.open.Load() == 0 })
	d := w.service.devices[0]
	w.eventually("nobody listens to the bell", func() bool {
		d.bell.mu.Lock()
		defer d.bell.mu.Unlock()
		return d.bell.watchers == nil
	})
	if code, value := w.wire().call("WatchStats", `{"interval_ms": 70000}`); code != 400 || value["code"] != "invalid_argument" {
		t.Error(code, value)
	}
}

// A holder that says nothing for longer than a header may take keeps its budget, by either protocol.
func TestSilentHoldersStay(t *testing.T) {
	w := &world{T: t, ledger: newFakeLedger(), socket: t.TempDir() + "/s"}
	var err error
	if w.service, err = New(&fakeLibrary{map[string]*fakeLedger{"": w.ledger}}, []Device{{ID: "host", Limit: kvcached.NoLimit}}); err != nil {
		t.Fatal(err)
	}
	w.server = NewServer(w.service, NewPolicy(noGroup))
	w.server.http.ReadHeaderTimeout = 100 * time.Millisecond
	listener, err := Listen(w.socket, noGroup)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = w.server.Serve(listener) }()
	t.Cleanup(w.server.Close)

	c, _ := w.grpc()
	taken, err := c.Allocate(within(t), &pb.AllocRequest{Size: mb})
	if err != nil {
		t.Fatal(err)
	}
	wire := w.wire()
	code, answer := wire.call("Allocate", `{"size": 1}`)
	if code != 200 {
		t.Fatal(answer)
	}
	mute := w.wire() // and one that never asks for anything loses its place
	time.Sleep(500 * time.Millisecond)
	if _, err := c.Free(within(t), &pb.FreeRequest{Handle: taken.Handle}); err != nil {
		t.Error(err)
	}
	if code, answer = wire.call("Free", fmt.Sprintf(`{"handle": %q}`, answer["handle"])); code != 200 {
		t.Error(answer)
	}
	if _, err := mute.reader.ReadByte(); err == nil {
		t.Error("a connection without a request was kept")
	}
}
