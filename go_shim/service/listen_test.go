package service

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvpatch.dev/shim/kvcached"
	pb "kvpatch.dev/shim/proto"
)

func listen(t *testing.T, path string, group int) *net.UnixListener {
	t.Helper()
	listener, err := Listen(path, group)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener
}

func TestModeOfTheSocket(t *testing.T) {
	mask := syscall.Umask(0) // the mode does not come from the caller's mask
	defer syscall.Umask(mask)
	alone := filepath.Join(t.TempDir(), "s")
	listen(t, alone, noGroup)
	shared := filepath.Join(t.TempDir(), "s")
	listen(t, shared, os.Getgid())
	for path, mode := range map[string]os.FileMode{alone: 0o600, shared: 0o660} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, want %v (%v)", path, info.Mode(), mode, err)
		}
	}
	if info, _ := os.Stat(shared); int(info.Sys().(*syscall.Stat_t).Gid) != os.Getgid() {
		t.Error("the socket is of another group")
	}
	if now := syscall.Umask(0); now != 0 {
		t.Errorf("the mask of the process is %o now", now)
	}
	if os.Getuid() == 0 {
		other := filepath.Join(t.TempDir(), "s")
		listen(t, other, 54322)
		if info, _ := os.Stat(other); info.Sys().(*syscall.Stat_t).Gid != 54322 {
			t.Error("the socket is not of the group")
		}
	}
}

func TestSocketsThatAreThere(t *testing.T) {
	folder := t.TempDir()
	file := filepath.Join(folder, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file, noGroup); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Error(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("a file of others was removed")
	}
	// One that nobody serves, as after kill -9.
	dead := filepath.Join(folder, "dead")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	_ = left.Close()
	listen(t, dead, noGroup)
	// One that is served: by a service, which has the lock, and by any other program.
	if _, err := Listen(dead, noGroup); err == nil || !strings.Contains(err.Error(), "another kvcachedd") {
		t.Error(err)
	}
	foreign := filepath.Join(folder, "foreign")
	served, err := net.Listen("unix", foreign)
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	if _, err := Listen(foreign, noGroup); err == nil || !strings.Contains(err.Error(), "being served") {
		t.Error(err)
	}
	if _, err := Listen(filepath.Join(folder, "no", "folder"), noGroup); err == nil || !strings.Contains(err.Error(), "has to exist") {
		t.Error(err)
	}
}

// serveActivated is the child that a socket is handed over to.
func serveActivated() int {
	listener, err := Activated()
	if err != nil {
		fmt.Println("refused:", err)
		return 0
	}
	if listener == nil {
		fmt.Println("nothing")
		return 0
	}
	service, err := New(&fakeLibrary{map[string]*fakeLedger{"": newFakeLedger()}}, []Device{{ID: "host", Limit: kvcached.NoLimit}})
	if err == nil {
		err = Ready()
	}
	if err == nil {
		err = NewServer(service, NewPolicy(noGroup)).Serve(listener)
	}
	fmt.Println("failed:", err)
	return 1
}

// activate starts the child as systemd does; %d in a variable becomes the child's own number.
func activate(t *testing.T, file *os.File, variables ...string) *exec.Cmd {
	t.Helper()
	inner := child(t, "activated", -1)
	// The number is known only once the process is there: a shell puts it in and becomes the child.
	command := exec.Command("/bin/sh", "-c", `for v; do export "$(printf "$v" $$)"; done; exec "$PROGRAM"`, "sh")
	command.Args = append(command.Args, variables...)
	command.Env = append(inner.Env, "PROGRAM="+inner.Path)
	command.ExtraFiles = []*os.File{file}
	return command
}

func TestSocketFromSystemd(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	file, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	output := func(what *os.File, variables ...string) string {
		t.Helper()
		text, err := activate(t, what, variables...).Output()
		if err != nil {
			t.Fatal(err, string(text))
		}
		return strings.TrimSpace(string(text))
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if got := output(file, "LISTEN_PID=%d", "LISTEN_FDS=1"); !strings.Contains(got, "SocketMode=0600") {
		t.Error(got)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := output(file, "LISTEN_PID=1", "LISTEN_FDS=1"); got != "nothing" {
		t.Error(got)
	}
	if got := output(file, "LISTEN_PID=%d", "LISTEN_FDS=2"); !strings.Contains(got, "one socket") {
		t.Error(got)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	other, err := tcp.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if got := output(other, "LISTEN_PID=%d", "LISTEN_FDS=1"); !strings.Contains(got, "a stream of unix") {
		t.Error(got)
	}

	notified, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(folder, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notified.Close()
	command := activate(t, file, "LISTEN_PID=%d", "LISTEN_FDS=1", "NOTIFY_SOCKET="+notified.LocalAddr().String())
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = command.Process.Kill(); _ = command.Wait() }()
	_ = notified.SetReadDeadline(time.Now().Add(20 * time.Second))
	message := make([]byte, 64)
	if n, err := notified.Read(message); err != nil || string(message[:n]) != "READY=1" {
		t.Error(string(message[:n]), err)
	}
	w := &world{T: t, socket: path}
	c, _ := w.grpc()
	stats, err := c.GetStats(within(t), &pb.StatsRequest{})
	if err != nil || stats.Version != "fake" {
		t.Fatal(stats, err)
	}
	if code, answer := w.wire().call("Allocate", `{"size": 1}`); code != 200 {
		t.Error(answer)
	}
}

func TestGroupID(t *testing.T) {
	if id, err := GroupID(""); id != noGroup || err != nil {
		t.Error(id, err)
	}
	if id, err := GroupID("root"); id != 0 || err != nil {
		t.Error(id, err)
	}
	if _, err := GroupID("no-such-group-" + strconv.Itoa(os.Getpid())); err == nil {
		t.Error("a group that is not there has a number")
	}
}
