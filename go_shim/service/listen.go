package service

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Listen makes the socket at path, with mode 0600, or 0660 of a system group. A socket that nobody serves any more is
// replaced; one that is served is an error, and so is any other file. The socket is removed when the listener is closed.
func Listen(path string, group int) (*net.UnixListener, error) {
	if err := guard(path); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s is there and is no socket: name another path by --socket", path)
		}
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("%s is being served by another process: end that one, or name another path by --socket", path)
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("%s is there and does not say whether it is served: %w", path, err)
		}
		slog.Info("removing a socket that was left behind", "socket", path)
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// Nobody may connect before mode and group are as they are to be. The mask is the whole process's: it is starting.
	before := syscall.Umask(0o177)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	syscall.Umask(before)
	if err != nil {
		return nil, err
	}
	if group != noGroup {
		if err := errors.Join(os.Lchown(path, -1, group), os.Chmod(path, 0o660)); err != nil {
			_ = listener.Close()
			return nil, fmt.Errorf("the socket cannot be given to group %d: %w", group, err)
		}
	}
	return listener, nil
}

// guard lets one process at a time make the socket, for as long as it lives: of two that find a dead socket at once, one
// would else remove the other's new one.
func guard(path string) error {
	name := path + ".lock"
	fd, err := syscall.Open(name, syscall.O_CREAT|syscall.O_RDWR|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("%s: %w; the folder of the socket has to exist, and to be writable", filepath.Clean(name), err)
	}
	if err := syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = syscall.Close(fd)
		return fmt.Errorf("another kvcachedd serves %s (%s is locked): end that one, or name another path by --socket", path, name)
	}
	return nil // stays open: the lock goes with the process
}

// Activated is the socket that systemd (or who does as it does: sd_listen_fds(3)) has handed over, nil if none was. The
// variables are taken out of the environment.
func Activated() (*net.UnixListener, error) {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name)
	}
	if count == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	if count != "1" {
		return nil, fmt.Errorf("LISTEN_FDS is %q: one socket is needed, so the .socket unit has one ListenStream", count)
	}
	const first = 3 // SD_LISTEN_FDS_START
	syscall.CloseOnExec(first)
	file := os.NewFile(first, "socket of LISTEN_FDS")
	defer file.Close() // FileListener makes a copy
	listener, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("the socket handed over by LISTEN_FDS cannot be used: %w", err)
	}
	unix, ok := listener.(*net.UnixListener)
	if !ok {
		_ = listener.Close()
		return nil, fmt.Errorf("the socket handed over by LISTEN_FDS is of %s: a stream of unix is needed", listener.Addr().Network())
	}
	unix.SetUnlinkOnClose(false) // it is systemd's
	path := unix.Addr().String()
	info, err := os.Stat(path)
	if err == nil && info.Mode().Perm()&0o007 != 0 {
		err = fmt.Errorf("everybody may connect to %s (mode %04o): SocketMode=0600 is needed, or 0660 with a SocketGroup", path, info.Mode().Perm())
	}
	if err != nil {
		_ = unix.Close()
		return nil, err
	}
	return unix, nil
}

// GroupID is the number of a system group, -1 for "".
func GroupID(name string) (int, error) {
	if name == "" {
		return noGroup, nil
	}
	group, err := user.LookupGroup(name)
	if err != nil {
		return noGroup, fmt.Errorf("%q is no group of this system: `getent group` lists them", name)
	}
	return strconv.Atoi(group.Gid)
}

// Ready tells systemd that connections are served, where it wants to know (sd_notify(3)).
func Ready() error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	_ = os.Unsetenv("NOTIFY_SOCKET")
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("READY=1"))
	return err
}
