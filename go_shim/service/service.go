package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvpatch.dev/shim/kvcached"
	pb "kvpatch.dev/shim/proto"
)

// Bounds of what one service holds and reads.
const (
	MaxConnections = 64
	MaxLeases      = 1024
	MaxMessage     = 64 << 10 // bytes of a request or an answer
	maxSize        = 1 << 44  // from there on the ledger has no limit
	maxName        = 255
	maxGroup       = 31 // KVCACHED_GROUP_MAX
)

// Device is a ledger that the service works on, and the limit that it sets there for all groups together.
type Device struct {
	ID    string // kvcached.HostID, a PCI bus id, or a UUID
	Path  string // of the ledger; "" for the user's own of host memory
	Limit uint64 // kvcached.NoLimit: the limit in the ledger is left as it is
}

// device is a Device that was opened.
type device struct {
	Device
	library kvcached.Library
	bell    bell

	mu     sync.Mutex
	ledger kvcached.Ledger
}

// Service does what the contract says. It is the server of the generated code.
type Service struct {
	pb.UnimplementedKVCachedServer
	library kvcached.Library
	devices []*device
	leases  table
}

// New opens the ledgers and sets their limits.
func New(library kvcached.Library, devices []Device) (*Service, error) {
	if len(devices) == 0 {
		return nil, errors.New("no device to serve")
	}
	s := &Service{library: library, leases: table{most: MaxLeases, held: map[int64]*lease{}}}
	for _, wanted := range devices {
		for _, other := range s.devices {
			if other.ID == wanted.ID {
				return nil, fmt.Errorf("device %s is named twice", wanted.ID)
			}
		}
		d := &device{Device: wanted, library: library}
		if _, err := d.open(); err != nil {
			return nil, fmt.Errorf("device %s: %w", wanted.ID, err)
		}
		s.devices = append(s.devices, d)
	}
	return s, nil
}

// open opens the ledger, in place of the one before, and sets its limit.
func (d *device) open() (kvcached.Ledger, error) {
	ledger, err := d.library.OpenLedger(d.Path)
	if err != nil {
		return nil, err
	}
	limit, err := ledger.Limit("")
	if err == nil && d.Limit != kvcached.NoLimit {
		limit, err = ledger.SetLimit("", d.Limit)
	}
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.ledger = ledger
	d.mu.Unlock()
	slog.Info("device", "device", d.ID, "ledger", ledger.Path(), "limit", shownLimit(limit.Bytes), "set_here", d.Limit != kvcached.NoLimit,
		"charged", kvcached.FormatSize(limit.Charge), "above", kvcached.FormatSize(limit.Overage))
	return ledger, nil
}

func (d *device) current() kvcached.Ledger {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ledger
}

// Allocate takes a budget for the connection that ctx is of.
func (s *Service) Allocate(ctx context.Context, req *pb.AllocRequest) (*pb.AllocResponse, error) {
	holder, err := holderOf(ctx)
	if err != nil {
		return nil, err
	}
	d, err := s.device(req.GetDevice())
	if err != nil {
		return nil, err
	}
	group, err := groupOf(holder, req.GetGroup())
	if err != nil {
		return nil, err
	}
	switch {
	case req.GetSize() < 1 || req.GetSize() > maxSize:
		return nil, status.Errorf(codes.InvalidArgument, "size %d: it is a number of bytes, from 1 to %d", req.GetSize(), int64(maxSize))
	case req.GetFixed() < 0 || req.GetFixed() > req.GetSize():
		return nil, status.Errorf(codes.InvalidArgument, "fixed %d: it is a part of size, from 0 to %d", req.GetFixed(), req.GetSize())
	case !printable(req.GetModelId(), maxName):
		return nil, status.Errorf(codes.InvalidArgument, "model_id: a name of at most %d bytes, without control characters, is needed", maxName)
	}
	if err := s.leases.begin(); err != nil {
		return nil, err
	}
	size, fixed := uint64(req.GetSize()), uint64(req.GetFixed())
	ledger := d.current()
	slot, err := ledger.Lease(group, req.GetModelId(), size, fixed, kvcached.NoLimit)
	if errors.Is(err, errLedger) {
		// The file was deleted or replaced: the processes that come now use another one, and so does the service.
		slog.Warn("the ledger is not the one that was opened; opening the one that is there now", "device", d.ID, "error", err)
		if ledger, err = d.open(); err == nil {
			slot, err = ledger.Lease(group, req.GetModelId(), size, fixed, kvcached.NoLimit)
		}
	}
	if err != nil {
		s.leases.cancel()
		return nil, failure(err)
	}
	l := &lease{holder: holder, ledger: ledger, device: d.ID, slot: slot, size: size, name: req.GetModelId()}
	handle, err := s.leases.add(l)
	if err != nil {
		l.drop("its holder ended meanwhile")
		return nil, err
	}
	slog.Info("budget taken", "handle", handle, "device", d.ID, "model", l.name, "size", kvcached.FormatSize(size), "group", group, "holder", holder)
	return &pb.AllocResponse{Handle: handle, Slot: int32(slot), Ledger: ledger.Path(), Group: group}, nil
}

// Free gives a budget of the same connection back.
func (s *Service) Free(ctx context.Context, req *pb.FreeRequest) (*pb.FreeResponse, error) {
	holder, err := holderOf(ctx)
	if err != nil {
		return nil, err
	}
	l := s.leases.take(holder, req.GetHandle())
	if l == nil {
		return nil, status.Errorf(codes.NotFound, "this connection holds no budget with handle %d", req.GetHandle())
	}
	l.drop("freed")
	return &pb.FreeResponse{}, nil
}

// SetLimit sets the limit of a card or of a group.
func (s *Service) SetLimit(ctx context.Context, req *pb.LimitRequest) (*pb.LimitResponse, error) {
	holder, err := holderOf(ctx)
	if err != nil {
		return nil, err
	}
	if !holder.peer.trusted {
		return nil, status.Error(codes.PermissionDenied, "limits are set by the service's own user and by root alone")
	}
	d, err := s.device(req.GetDevice())
	if err != nil {
		return nil, err
	}
	if !printable(req.GetGroup(), maxGroup) {
		return nil, status.Errorf(codes.InvalidArgument, "group: a name of at most %d bytes is needed", maxGroup)
	}
	bytes := kvcached.NoLimit
	if req.GetBytes() >= 0 {
		bytes = uint64(req.GetBytes())
	}
	limit, err := d.current().SetLimit(req.GetGroup(), bytes)
	if err != nil {
		return nil, failure(err)
	}
	slog.Info("limit set", "device", d.ID, "group", req.GetGroup(), "limit", shownLimit(limit.Bytes), "charged", kvcached.FormatSize(limit.Charge),
		"above", kvcached.FormatSize(limit.Overage), "by", holder)
	return &pb.LimitResponse{Bytes: signed(limit.Bytes), Charge: signed(limit.Charge), Overage: signed(limit.Overage), Revision: limit.Revision}, nil
}

// device finds a device by its name; the only one needs none.
func (s *Service) device(id string) (*device, error) {
	if id == "" && len(s.devices) == 1 {
		return s.devices[0], nil
	}
	var names []string
	for _, d := range s.devices {
		if strings.EqualFold(d.ID, id) {
			return d, nil
		}
		names = append(names, d.ID)
	}
	if id == "" {
		return nil, status.Errorf(codes.InvalidArgument, "device: name one of %s", strings.Join(names, ", "))
	}
	return nil, status.Errorf(codes.NotFound, "device %q is none of %s", id, strings.Join(names, ", "))
}

// groupOf is the group that a budget is charged to. Users that are only let in may not charge that of another.
func groupOf(h *holder, asked string) (string, error) {
	switch {
	case asked == "":
		return fmt.Sprintf("service-%d", h.peer.UID), nil
	case !h.peer.trusted:
		return "", status.Error(codes.PermissionDenied, "group: only the service's own user and root may name one")
	case !printable(asked, maxGroup):
		return "", status.Errorf(codes.InvalidArgument, "group: a name of at most %d bytes is needed", maxGroup)
	}
	return asked, nil
}

func printable(text string, most int) bool {
	return len(text) <= most && utf8.ValidString(text) && strings.IndexFunc(text, unicode.IsControl) < 0
}

func shownLimit(bytes uint64) string {
	if bytes == kvcached.NoLimit {
		return "none"
	}
	return kvcached.FormatSize(bytes)
}

// signed writes a size as the contract does: -1 for none.
func signed(bytes uint64) int64 {
	if bytes == kvcached.NoLimit {
		return -1
	}
	return int64(min(bytes, 1<<62))
}
