package service

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"kvpatch.dev/shim/kvcached"
	pb "kvpatch.dev/shim/proto"
)

// pair is a connection's accepted end, of this process itself.
func pair(t *testing.T) *net.UnixConn {
	t.Helper()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: t.TempDir() + "/s", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("unix", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := listener.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(); _ = accepted.Close() })
	return accepted
}

func TestPolicy(t *testing.T) {
	conn := pair(t)
	me, group := os.Getuid(), os.Getgid()
	peer, err := Policy{User: me, Group: noGroup}.admit(conn)
	if err != nil || peer.UID != me || peer.PID != os.Getpid() || !peer.trusted {
		t.Errorf("%+v %v", peer, err)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	peer, err = peerOf(conn, true)
	if err != nil || len(peer.groups) != len(groups)+1 || peer.groups[0] != group {
		t.Errorf("groups %v, want %d and %v, %v", peer.groups, group, groups, err)
	}
	if me == 0 {
		return // root is let in everywhere; TestOtherUsers goes on from here
	}
	if _, err = (Policy{User: me + 1, Group: noGroup}).admit(conn); err == nil || !strings.Contains(err.Error(), "neither user") {
		t.Error(err)
	}
	if peer, err = (Policy{User: me + 1, Group: group}).admit(conn); err != nil || peer.trusted {
		t.Error(peer, err)
	}
}

const childVariable = "KVCACHED_TEST_CHILD"

// TestMain is also the main function of the processes that tests start.
func TestMain(m *testing.M) {
	switch kind, argument, _ := strings.Cut(os.Getenv(childVariable), ":"); kind {
	case "":
		os.Exit(m.Run())
	case "call":
		os.Exit(callOnce(argument))
	case "hold":
		if code := callOnce(argument); code != 0 {
			os.Exit(code)
		}
		select {}
	case "activated":
		os.Exit(serveActivated())
	}
}

// kept keeps the connection of callOnce open.
var kept net.Conn

// callOnce takes a budget, and says by its exit code what came of it.
func callOnce(socket string) int {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 10 // may not connect
	}
	kept = conn
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{Dial: func(string, string) (net.Conn, error) { return conn, nil }}}
	answer, err := client.Post("http://kvcached/kvcached.v1.KVCached/Allocate", "application/json", strings.NewReader(`{"size": 1048576, "model_id": "child"}`))
	if err != nil {
		return 11 // not served
	}
	if answer.StatusCode != 200 {
		return 12
	}
	os.Stdout.WriteString("held\n")
	return 0
}

// child is a process that runs this test binary; uid -1: as this user.
func child(t *testing.T, what string, uid int, groups ...uint32) *exec.Cmd {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if uid >= 0 {
		// The test binary lies where other users may not look.
		folder, err := os.MkdirTemp("", "kvcachedd")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(folder) })
		content, err := os.ReadFile(program)
		if err == nil {
			program = filepath.Join(folder, "child")
			err = os.WriteFile(program, content, 0o755)
		}
		if err == nil {
			err = os.Chmod(folder, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	command := exec.Command(program)
	command.Dir = "/"
	command.Env = append(os.Environ(), childVariable+"="+what)
	if uid >= 0 {
		command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: 54321, Groups: groups}}
	}
	return command
}

// Real processes of another user: the mode keeps them out, and where it does not the credentials do. A group lets them in,
// to budgets but not to limits.
func TestOtherUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	const stranger = 54321
	folder, err := os.MkdirTemp("", "kvcachedd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(folder)
	if err := os.Chmod(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, one := range []struct {
		name   string
		group  int
		mode   os.FileMode // 0: as Listen makes it
		groups []uint32
		want   int
	}{
		{"by the mode", noGroup, 0, nil, 10},
		{"by the credentials", noGroup, 0o666, nil, 11},
		{"of another group", 54322, 0o666, []uint32{54323}, 11},
		{"of the group", 54322, 0, []uint32{54322}, 0},
	} {
		t.Run(one.name, func(t *testing.T) {
			w := &world{T: t, ledger: newFakeLedger(), socket: filepath.Join(folder, strings.ReplaceAll(one.name, " ", "-"))}
			if w.service, err = New(&fakeLibrary{map[string]*fakeLedger{"": w.ledger}}, []Device{{ID: "host", Limit: kvcached.NoLimit}}); err != nil {
				t.Fatal(err)
			}
			listener := listen(t, w.socket, one.group)
			w.server = NewServer(w.service, Policy{User: 0, Group: one.group})
			go func() { _ = w.server.Serve(listener) }()
			defer w.server.Close()
			if one.mode != 0 {
				if err := os.Chmod(w.socket, one.mode); err != nil {
					t.Fatal(err)
				}
			}
			command := child(t, "call:"+w.socket, stranger, one.groups...)
			_ = command.Run()
			if got := command.ProcessState.ExitCode(); got != one.want {
				t.Fatalf("the stranger's exit code is %d, want %d", got, one.want)
			}
			w.eventually("its budget has gone", func() bool { return w.charged() == 0 })
			w.ledger.mu.Lock()
			defer w.ledger.mu.Unlock()
			if taken := one.want == 0; taken != (w.ledger.next == 1) {
				t.Errorf("%d leases were taken", w.ledger.next)
			}
		})
	}
}

// What a user that was let in by the group may not do.
func TestMembersOfTheGroup(t *testing.T) {
	service, err := New(&fakeLibrary{map[string]*fakeLedger{"": newFakeLedger()}}, []Device{{ID: "host", Limit: kvcached.NoLimit}})
	if err != nil {
		t.Fatal(err)
	}
	ctx := withHolder(within(t), &holder{peer: Peer{UID: 7}})
	_, err = service.SetLimit(ctx, &pb.LimitRequest{Bytes: 1})
	wantCode(t, err, codes.PermissionDenied, "limits")
	_, err = service.Allocate(ctx, &pb.AllocRequest{Size: 1, Group: "ollama-1"})
	wantCode(t, err, codes.PermissionDenied, "group")
	taken, err := service.Allocate(ctx, &pb.AllocRequest{Size: 1})
	if err != nil || taken.Group != "service-7" {
		t.Error(taken, err)
	}
}

// kill -9 of a holder: its budget goes, the other's stays.
func TestKilledHolder(t *testing.T) {
	w := newWorld(t, kvcached.NoLimit)
	c, _ := w.grpc()
	if _, err := c.Allocate(within(t), &pb.AllocRequest{Size: 3 * mb}); err != nil {
		t.Fatal(err)
	}
	command := child(t, "hold:"+w.socket, -1)
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	w.eventually("the child holds", func() bool { return w.charged() == 4*mb })
	if err := command.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = command.Wait()
	w.eventually("the child's budget has gone", func() bool { return w.charged() == 3*mb })
}
