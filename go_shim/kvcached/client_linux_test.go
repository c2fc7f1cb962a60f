package kvcached

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// A server of another user on the socket is not believed, but for the owner of a socket that the named group has alone.
func TestClientChecksWhoServes(t *testing.T) {
	folder := t.TempDir()
	socket := filepath.Join(folder, "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dial := func() error {
		conn, err := NewClient(socket, "").dial(bounded(t))
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	if err := dial(); err != nil {
		t.Error(err)
	}
	if os.Getuid() != 0 {
		return // to be served by somebody else takes root
	}

	const stranger = 54321
	for _, one := range []struct {
		name  string
		group string // that the client trusts
		gid   int    // of the socket
		mode  os.FileMode
		part  string // "": it is believed
	}{
		{"stranger", "", 0, 0o600, "served by user 54321"},
		{"other group", "daemon", 0, 0o660, "served by user 54321"},
		{"open to all", "daemon", 1, 0o666, "served by user 54321"},
		{"group", "daemon", 1, 0o660, ""},
	} {
		t.Run(one.name, func(t *testing.T) {
			path := filepath.Join(folder, strings.ReplaceAll(one.name, " ", "-"))
			fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			file := os.NewFile(uintptr(fd), "socket")
			defer file.Close()
			if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(path, stranger, one.gid); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, one.mode); err != nil {
				t.Fatal(err)
			}
			if err := listenAs(fd, stranger); err != nil {
				t.Fatal(err)
			}
			conn, err := NewClient(path, one.group).dial(bounded(t))
			if err == nil {
				_ = conn.Close()
			}
			if (err == nil) != (one.part == "") || (err != nil && !strings.Contains(err.Error(), one.part)) {
				t.Errorf("%v, want %q", err, one.part)
			}
		})
	}
}

// listenAs has another user serve a socket: the kernel remembers whose thread called listen. Only root can do that.
func listenAs(fd int, user uintptr) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const keep = ^uintptr(0)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, user, keep); errno != 0 {
		return errno
	}
	err := syscall.Listen(fd, 5)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, 0, keep); errno != 0 {
		return errno
	}
	return err
}
