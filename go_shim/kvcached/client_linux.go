package kvcached

import (
	"fmt"
	"net"
	"os"
	"os/user"
	"strconv"
	"syscall"
)

// checkPeer makes sure that who serves a socket may be believed: this user, root (systemd makes sockets, too), or, where a
// group was named, the owner of a socket that this group has and nobody else may connect to. Anyone can put a socket into
// /tmp.
func checkPeer(conn *net.UnixConn, socket, group string) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *syscall.Ucred
	var failed error
	if err = raw.Control(func(fd uintptr) {
		cred, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err == nil {
		err = failed
	}
	if err != nil {
		return fmt.Errorf("the kernel does not say who serves it: %w", err)
	}
	if int(cred.Uid) == os.Getuid() || cred.Uid == 0 {
		return nil
	}
	if group != "" && ownedWithin(socket, group, cred.Uid) {
		return nil
	}
	return fmt.Errorf("it is served by user %d, who is neither this server's user %d nor root, nor the owner of a socket of the group in %s",
		cred.Uid, os.Getuid(), SystemGroupVariable)
}

func ownedWithin(socket, group string, owner uint32) bool {
	found, err := user.LookupGroup(group)
	if err != nil {
		return false
	}
	gid, err := strconv.ParseUint(found.Gid, 10, 32)
	if err != nil {
		return false
	}
	var st syscall.Stat_t
	if syscall.Lstat(socket, &st) != nil {
		return false
	}
	return st.Uid == owner && uint64(st.Gid) == gid && st.Mode&0o007 == 0
}

// fileID tells files of one path apart, as kvcachedd does; "" where there is none.
func fileID(path string) string {
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}
