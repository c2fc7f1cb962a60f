package service

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"kvpatch.dev/shim/kvcached"
	pb "kvpatch.dev/shim/proto"
)

// world is a server on a socket of its own, over a ledger in memory.
type world struct {
	*testing.T
	ledger  *fakeLedger
	service *Service
	server  *Server
	socket  string
}

func newWorld(t *testing.T, limit uint64, policies ...Policy) *world {
	t.Helper()
	w := &world{T: t, ledger: newFakeLedger(), socket: filepath.Join(t.TempDir(), "s")}
	var err error
	w.service, err = New(&fakeLibrary{map[string]*fakeLedger{"": w.ledger}}, []Device{{ID: kvcached.HostID, Limit: limit}})
	if err != nil {
		t.Fatal(err)
	}
	policy := NewPolicy(noGroup)
	if len(policies) > 0 {
		policy = policies[0]
	}
	w.server = NewServer(w.service, policy)
	listener, err := Listen(w.socket, noGroup)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- w.server.Serve(listener) }()
	t.Cleanup(func() {
		w.server.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(w.socket); err == nil {
			t.Error("the socket was left behind")
		}
		w.eventually("no budget is left", func() bool { return w.service.leases.count() == 0 })
	})
	return w
}

// grpc is a client with a connection of its own.
func (w *world) grpc() (pb.KVCachedClient, *grpc.ClientConn) {
	w.Helper()
	conn, err := grpc.NewClient("unix:"+w.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = conn.Close() })
	return pb.NewKVCachedClient(conn), conn
}

// wire is a plain connection that speaks HTTP/1.1.
type wire struct {
	*world
	conn   net.Conn
	reader *bufio.Reader
}

func (w *world) wire() *wire {
	w.Helper()
	conn, err := net.Dial("unix", w.socket)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = conn.Close() })
	return &wire{w, conn, bufio.NewReader(conn)}
}

// send starts a call, and returns the answer's head.
func (w *wire) send(method string, body []byte) *http.Response {
	w.Helper()
	request, err := http.NewRequest(http.MethodPost, "http://kvcached/kvcached.v1.KVCached/"+method, bytes.NewReader(body))
	if err != nil {
		w.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	if err := request.Write(w.conn); err != nil {
		w.Fatal(err)
	}
	answer, err := http.ReadResponse(w.reader, request)
	if err != nil {
		w.Fatal(err)
	}
	return answer
}

// call is a call whose answer is one object.
func (w *wire) call(method, body string) (int, map[string]any) {
	w.Helper()
	answer := w.send(method, []byte(body))
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		w.Fatal(err)
	}
	var value map[string]any
	if err := json.Unmarshal(text, &value); err != nil {
		w.Fatalf("%s: %v: %s", method, err, text)
	}
	return answer.StatusCode, value
}

func (w *world) eventually(what string, holds func() bool) {
	w.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.Fatalf("never came true: %s", what)
		}
	}
}

func (w *world) charged() uint64 {
	limit, _ := w.ledger.Limit("")
	return limit.Charge
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}
