package service

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	"kvpatch.dev/shim/kvcached"
	pb "kvpatch.dev/shim/proto"
)

const mb = 1 << 20

func wantCode(t *testing.T, err error, code codes.Code, part string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), part) {
		t.Fatalf("got %v, want %s with %q", err, code, part)
	}
}

// The fields and numbers that other programs were specified with.
func TestContractOfTheSpecification(t *testing.T) {
	for message, fields := range map[string]map[string]int{
		"AllocRequest":  {"size": 1, "model_id": 2},
		"AllocResponse": {"handle": 1, "gpu_ptr": 2},
	} {
		for name, number := range fields {
			field := pb.File_kvcached_proto.Messages().ByName(protoreflect.Name(message)).Fields().ByName(protoreflect.Name(name))
			if field == nil || int(field.Number()) != number {
				t.Errorf("%s.%s is %v, want number %d", message, name, field, number)
			}
		}
	}
	service := pb.File_kvcached_proto.Services().ByName("KVCached")
	for method, types := range map[string][2]string{
		"Allocate": {"AllocRequest", "AllocResponse"}, "Free": {"FreeRequest", "FreeResponse"}, "GetStats": {"StatsRequest", "StatsResponse"},
	} {
		m := service.Methods().ByName(protoreflect.Name(method))
		if m == nil || string(m.Input().Name()) != types[0] || string(m.Output().Name()) != types[1] || m.IsStreamingServer() {
			t.Errorf("%s is %v", method, m)
		}
	}
	if service.FullName() != "kvcached.v1.KVCached" {
		t.Error(service.FullName())
	}
}

// One holder by gRPC, one by JSON: the one that goes takes its own budget with it, and nothing else.
func TestBudgetsEndWithTheirConnection(t *testing.T) {
	w := newWorld(t, 100*mb)
	ctx := within(t)
	a, connA := w.grpc()
	first, err := a.Allocate(ctx, &pb.AllocRequest{Size: 60 * mb, ModelId: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if first.GpuPtr != 0 || first.Handle == 0 || first.Ledger != "/dev/null" || !strings.HasPrefix(first.Group, "service-") {
		t.Errorf("allocated %v", first)
	}
	b := w.wire()
	if code, answer := b.call("Allocate", fmt.Sprintf(`{"size": "%d", "model_id": "b"}`, 50*mb)); code != 429 || answer["code"] != "resource_exhausted" ||
		answer["reason"] != "KVCACHED_E_LIMIT" ||
		!strings.Contains(answer["message"].(string), "KVCACHED_E_LIMIT") {
		t.Errorf("beyond the limit: %d %v", code, answer)
	}
	code, second := b.call("Allocate", fmt.Sprintf(`{"size": %d, "model_id": "b"}`, 40*mb))
	if code != 200 || second["gpu_ptr"] != "0" || w.charged() != 100*mb {
		t.Fatalf("%d %v, charged %d", code, second, w.charged())
	}
	if err := connA.Close(); err != nil {
		t.Fatal(err)
	}
	w.eventually("a's budget has gone", func() bool { return w.charged() == 40*mb })
	if code, _ := b.call("Free", fmt.Sprintf(`{"handle": "%d"}`, first.Handle)); code != 404 {
		t.Errorf("freeing what has lapsed: %d", code)
	}
	_ = b.conn.Close()
	w.eventually("b's budget has gone", func() bool { return w.charged() == 0 })
}

func TestAHandleIsOfItsConnectionAlone(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	ctx := within(t)
	a, _ := w.grpc()
	b, _ := w.grpc()
	taken, err := a.Allocate(ctx, &pb.AllocRequest{Size: mb})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Free(ctx, &pb.FreeRequest{Handle: taken.Handle})
	wantCode(t, err, codes.NotFound, "holds no budget")
	if _, err := a.Free(ctx, &pb.FreeRequest{Handle: taken.Handle}); err != nil {
		t.Error(err)
	}
	_, err = a.Free(ctx, &pb.FreeRequest{Handle: taken.Handle})
	wantCode(t, err, codes.NotFound, "holds no budget")
	if w.charged() != 0 {
		t.Error(w.charged())
	}
}

// The connection ends while the ledger is being asked: the lease that comes after must not stay.
func TestHolderEndsDuringAllocate(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	asked, goOn := make(chan struct{}), make(chan struct{})
	w.ledger.before = func(string) { close(asked); <-goOn }
	a, conn := w.grpc()
	go func() { _, _ = a.Allocate(within(t), &pb.AllocRequest{Size: mb}) }()
	<-asked
	_ = conn.Close()
	w.eventually("the connection has ended", func() bool { return w.server.open.Load() == 0 })
	close(goOn)
	w.eventually("the lease was taken and dropped", func() bool {
		w.ledger.mu.Lock()
		defer w.ledger.mu.Unlock()
		return w.ledger.next == 1 && len(w.ledger.slots) == 0
	})
}

func TestRequestsThatAreRefused(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	ctx := within(t)
	c, _ := w.grpc()
	for _, one := range []struct {
		request *pb.AllocRequest
		code    codes.Code
		part    string
	}{
		{&pb.AllocRequest{}, codes.InvalidArgument, "size 0"},
		{&pb.AllocRequest{Size: -1}, codes.InvalidArgument, "size -1"},
		{&pb.AllocRequest{Size: maxSize + 1}, codes.InvalidArgument, "size"},
		{&pb.AllocRequest{Size: 1, Fixed: 2}, codes.InvalidArgument, "fixed 2"},
		{&pb.AllocRequest{Size: 1, Fixed: -2}, codes.InvalidArgument, "fixed -2"},
		{&pb.AllocRequest{Size: 1, ModelId: strings.Repeat("x", 256)}, codes.InvalidArgument, "model_id"},
		{&pb.AllocRequest{Size: 1, ModelId: "a\nb"}, codes.InvalidArgument, "model_id"},
		{&pb.AllocRequest{Size: 1, Group: strings.Repeat("g", 32)}, codes.InvalidArgument, "group"},
		{&pb.AllocRequest{Size: 1, Device: "gpu"}, codes.NotFound, "none of host"},
	} {
		_, err := c.Allocate(ctx, one.request)
		wantCode(t, err, one.code, one.part)
	}
	_, err := c.SetLimit(ctx, &pb.LimitRequest{Group: "nobody", Bytes: 1})
	wantCode(t, err, codes.FailedPrecondition, "KVCACHED_E_SLOT")
	_, err = c.GetStats(ctx, &pb.StatsRequest{Device: "gpu"})
	wantCode(t, err, codes.NotFound, "none of host")

	wire := w.wire()
	for body, part := range map[string]string{`{"size": "x"}`: "not of the contract", `{"bytes": 1}`: "not of the contract", `[]`: "not of the contract"} {
		if code, answer := wire.call("Allocate", body); code != 400 || !strings.Contains(answer["message"].(string), part) {
			t.Errorf("%s: %d %v", body, code, answer)
		}
	}
	if answer := wire.send("Nothing", nil); answer.StatusCode != 404 {
		t.Error(answer.Status)
	}
	if w.charged() != 0 {
		t.Error(w.charged())
	}
}

func TestMessagesThatAreTooLarge(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	c, _ := w.grpc()
	_, err := c.Allocate(within(t), &pb.AllocRequest{Size: 1, ModelId: strings.Repeat("x", MaxMessage)}, grpc.MaxCallSendMsgSize(1<<30))
	wantCode(t, err, codes.ResourceExhausted, "larger than max")
	large := append([]byte(`{"model_id": "`), bytes.Repeat([]byte("x"), MaxMessage)...)
	if answer := w.wire().send("Allocate", append(large, `"}`...)); answer.StatusCode != 429 {
		t.Error(answer.Status)
	}
	if w.charged() != 0 {
		t.Error(w.charged())
	}
}

func TestBounds(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	w.service.leases.most = 3
	c, _ := w.grpc()
	for range 3 {
		if _, err := c.Allocate(within(t), &pb.AllocRequest{Size: 1}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := c.Allocate(within(t), &pb.AllocRequest{Size: 1})
	wantCode(t, err, codes.ResourceExhausted, "holds 3 budgets")

	// The gRPC connection is one of them.
	for range MaxConnections - 1 {
		if code, _ := w.wire().call("GetStats", "{}"); code != 200 {
			t.Fatal(code)
		}
	}
	extra := w.wire()
	if _, err := extra.reader.ReadByte(); err == nil {
		t.Error("a connection too many was served")
	}
}

// A failed lease leaves its place to the next, and a ledger that was replaced is opened again.
func TestLedgerFailures(t *testing.T) {
	w := newWorld(t, 10*mb)
	w.service.leases.most = 1
	c, _ := w.grpc()
	w.ledger.fail = errors.New("broken")
	_, err := c.Allocate(within(t), &pb.AllocRequest{Size: 1})
	wantCode(t, err, codes.Internal, "broken")
	w.ledger.fail = &kvcached.LibraryError{Name: "KVCACHED_E_LEDGER", Text: "replaced"}
	w.ledger.limit = kvcached.Limit{Bytes: kvcached.NoLimit} // a new file has none
	if _, err := c.Allocate(within(t), &pb.AllocRequest{Size: 1}); err != nil {
		t.Fatal(err)
	}
	if limit, _ := w.ledger.Limit(""); limit.Bytes != 10*mb {
		t.Errorf("the limit of a ledger opened again is %d", limit.Bytes)
	}
}

func TestSetLimit(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	c, _ := w.grpc()
	ctx := within(t)
	if _, err := c.Allocate(ctx, &pb.AllocRequest{Size: 3 * mb}); err != nil {
		t.Fatal(err)
	}
	set, err := c.SetLimit(ctx, &pb.LimitRequest{Bytes: mb})
	if err != nil || set.Bytes != mb || set.Charge != 3*mb || set.Overage != 2*mb || set.Revision != 1 {
		t.Errorf("%v %v", set, err)
	}
	_, err = c.Allocate(ctx, &pb.AllocRequest{Size: 1})
	wantCode(t, err, codes.ResourceExhausted, "")
	if set, err = c.SetLimit(ctx, &pb.LimitRequest{Bytes: -1}); err != nil || set.Bytes != -1 {
		t.Errorf("%v %v", set, err)
	}
	if set, err = c.SetLimit(ctx, &pb.LimitRequest{Bytes: 0}); err != nil || set.Bytes != 0 {
		t.Errorf("%v %v", set, err)
	}
}

func TestNewRefusesDevices(t *testing.T) {
	library := &fakeLibrary{map[string]*fakeLedger{"": newFakeLedger()}}
	for part, devices := range map[string][]Device{
		"no device": nil, "twice": {{ID: "host"}, {ID: "host"}}, "device x: no ledger y": {{ID: "x", Path: "y"}},
	} {
		if _, err := New(library, devices); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v, want %q", err, part)
		}
	}
}
