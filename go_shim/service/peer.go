package service

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"unsafe"
)

// soPeerGroups is SO_PEERGROUPS of socket(7): a peer's supplementary groups. Since Linux 4.13.
const soPeerGroups = 59

// noGroup as a Policy's Group lets no group in.
const noGroup = -1

// Peer is who made a connection, by the word of the kernel at that moment.
type Peer struct {
	PID     int // as this process counts; 0 for one that it cannot see
	UID     int
	groups  []int
	trusted bool // the service's own user, or root
}

// Policy is who may connect: the service's own user, root, and who is in Group.
type Policy struct {
	User  int
	Group int // noGroup for none
}

// NewPolicy lets the current user in, and the members of a group, -1 for none.
func NewPolicy(group int) Policy { return Policy{User: os.Getuid(), Group: group} }

// admit identifies the other end of a connection, and says why it may not come in.
func (p Policy) admit(conn *net.UnixConn) (Peer, error) {
	peer, err := peerOf(conn, p.Group != noGroup)
	if err != nil {
		return peer, err
	}
	peer.trusted = peer.UID == p.User || peer.UID == 0
	if !peer.trusted && (p.Group == noGroup || !slices.Contains(peer.groups, p.Group)) {
		return peer, fmt.Errorf("user %d (process %d) is neither user %d, whom this service is for, nor let in by a group", peer.UID, peer.PID, p.User)
	}
	return peer, nil
}

// peerOf asks the kernel; withGroups also for the groups.
func peerOf(conn *net.UnixConn, withGroups bool) (Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var peer Peer
	var failed error
	err = raw.Control(func(fd uintptr) {
		cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		if err != nil {
			failed = err
			return
		}
		peer = Peer{PID: int(cred.Pid), UID: int(cred.Uid), groups: []int{int(cred.Gid)}}
		if withGroups {
			more, err := supplementary(fd)
			peer.groups, failed = append(peer.groups, more...), err
		}
	})
	if err = errors.Join(err, failed); err != nil {
		return Peer{}, fmt.Errorf("the kernel does not say who is connected: %w", err)
	}
	return peer, nil
}

func supplementary(fd uintptr) ([]int, error) {
	ids := make([]uint32, 64)
	for {
		size := uint32(len(ids) * 4)
		_, _, errno := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, syscall.SOL_SOCKET, soPeerGroups,
			uintptr(unsafe.Pointer(&ids[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == syscall.ERANGE && int(size) > len(ids)*4:
			ids = make([]uint32, size/4)
			continue
		case errno == syscall.ENOPROTOOPT:
			return nil, nil // an older kernel: the primary group alone counts
		case errno != 0:
			return nil, errno
		}
		var found []int
		for _, id := range ids[:size/4] {
			found = append(found, int(id))
		}
		return found, nil
	}
}
