package kvcached

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	servicePath    = "/kvcached.v1.KVCached/"
	serviceMessage = 64 << 10         // bytes that a message has at most
	serviceWait    = 5 * time.Second  // for an answer, where the caller sets no bound
	serviceEvery   = 5 * time.Second  // between two messages of the stream; also how long a lost connection stays unknown
	serviceRetry   = time.Second      // after a failure, twice as long after each further one
	serviceRetries = 30 * time.Second // the longest
)

// Client talks to kvcachedd, by JSON over its unix socket. Budgets are held by one connection, on which calls take turns;
// when it is lost (the service was restarted) the next call makes a new one and takes them again.
type Client struct {
	socket string
	group  string
	turn   chan struct{} // holds one while somebody has the fields below
	conn   *serviceConn
	leases []*ServiceLease
}

// ServiceDown is an error of the way to the service: nobody serves the socket, or the wrong one does.
type ServiceDown struct {
	Socket string
	Err    error
}

func (e *ServiceDown) Error() string {
	return fmt.Sprintf("the kvcached service at %s cannot be reached: %v", e.Socket, e.Err)
}

func (e *ServiceDown) Unwrap() error { return e.Err }

// ServiceError is what the service answered. errors.Is compares it with errors of the library, such as ErrLimit.
type ServiceError struct {
	Code    string `json:"code"`    // resource_exhausted, not_found, ...
	Reason  string `json:"reason"`  // KVCACHED_E_..., where it is the library's answer
	Message string `json:"message"` // for people
}

func (e *ServiceError) Error() string {
	return fmt.Sprintf("kvcached service: %s (%s)", e.Message, e.Code)
}

// Is holds for the library's error of the same name.
func (e *ServiceError) Is(target error) bool {
	other, ok := target.(*LibraryError)
	return ok && e.Reason != "" && other.Name == e.Reason
}

// ServiceRequest asks for a budget. Sizes are bytes.
type ServiceRequest struct {
	Size   int64  `json:"size,string"`
	Model  string `json:"model_id"`
	Device string `json:"device,omitempty"` // as ServiceDevice names it; "" where the service has one
	Group  string `json:"group,omitempty"`  // "" for the one of this user
	Fixed  int64  `json:"fixed,string,omitempty"`
}

// ServiceLease is a budget, charged until Free, or until this process or the service ends.
type ServiceLease struct {
	Slot   int    // as it was taken first
	Ledger string // path
	Group  string

	client  *Client
	request ServiceRequest
	handle  int64 // 0: lost, and not yet taken again
}

// ServiceDevice is a ledger that the service sets the limit of.
type ServiceDevice struct {
	Device   string `json:"device"` // HostID, a bus id, or a UUID
	Ledger   string `json:"ledger"`
	File     string `json:"ledger_file"`
	Limit    int64  `json:"limit,string"` // of all groups together; -1 for none
	Charge   int64  `json:"charge,string"`
	Overage  int64  `json:"overage,string"`
	Revision uint32 `json:"revision"`
}

// Same says whether the ledger at path is this device's: then what is charged there counts under the service's limit by
// itself. Else it is another user's or another container's ledger, and takes a budget to count.
func (d ServiceDevice) Same(path string) bool { return d.File != "" && d.File == fileID(path) }

// ServiceStats is what the service tells about itself.
type ServiceStats struct {
	Devices     []ServiceDevice `json:"devices"`
	Version     string          `json:"version"`
	Leases      int             `json:"leases"`
	Connections int             `json:"connections"`
}

// NewClient is a client of the service at a socket; nothing is connected yet. The service has to be of this user or root,
// or of the owner of a socket that a group has: the one named, "" for none.
func NewClient(socket, group string) *Client {
	return &Client{socket: socket, group: group, turn: make(chan struct{}, 1)}
}

// Allocate takes a budget. It returns a *ServiceDown, or a *ServiceError that is ErrLimit where a limit leaves no room.
func (c *Client) Allocate(ctx context.Context, request ServiceRequest) (*ServiceLease, error) {
	lease := &ServiceLease{client: c, request: request}
	err := c.do(ctx, func(ctx context.Context) error {
		if err := c.allocate(ctx, lease); err != nil {
			return err
		}
		c.leases = append(c.leases, lease)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return lease, nil
}

// allocate: held turn.
func (c *Client) allocate(ctx context.Context, lease *ServiceLease) error {
	var answer struct {
		Handle int64  `json:"handle,string"`
		Slot   int    `json:"slot"`
		Ledger string `json:"ledger"`
		Group  string `json:"group"`
	}
	if err := c.conn.call(ctx, "Allocate", lease.request, &answer); err != nil {
		return err
	}
	lease.handle = answer.Handle
	lease.Slot, lease.Ledger, lease.Group = answer.Slot, answer.Ledger, answer.Group
	return nil
}

// Free gives a budget back. With the service down there is nothing to give back: it ended with its connection.
func (l *ServiceLease) Free() error {
	c := l.client
	ctx, cancel := context.WithTimeout(context.Background(), serviceWait)
	defer cancel()
	if err := c.lock(ctx); err != nil {
		return &ServiceDown{c.socket, err}
	}
	defer c.unlock()
	i := slices.Index(c.leases, l)
	if i < 0 {
		return nil
	}
	c.leases = slices.Delete(c.leases, i, i+1)
	if l.handle == 0 || !c.conn.alive() {
		return nil
	}
	return c.exchange(ctx, "Free", map[string]any{"handle": fmt.Sprint(l.handle)}, &struct{}{})
}

// Stats asks for the devices' limits and charges.
func (c *Client) Stats(ctx context.Context) (*ServiceStats, error) {
	stats := &ServiceStats{}
	return stats, c.do(ctx, func(ctx context.Context) error { return c.conn.call(ctx, "GetStats", struct{}{}, stats) })
}

// SetLimit sets the limit of a device for a group, "" for all groups together; NoLimit removes it.
func (c *Client) SetLimit(ctx context.Context, device, group string, bytes uint64) (Limit, error) {
	limit := int64(-1)
	if bytes != NoLimit {
		limit = int64(min(bytes, 1<<62))
	}
	var answer struct {
		Bytes    int64  `json:"bytes,string"`
		Charge   int64  `json:"charge,string"`
		Overage  int64  `json:"overage,string"`
		Revision uint32 `json:"revision"`
	}
	err := c.do(ctx, func(ctx context.Context) error {
		return c.conn.call(ctx, "SetLimit", map[string]any{"device": device, "group": group, "bytes": fmt.Sprint(limit)}, &answer)
	})
	if err != nil {
		return Limit{}, err
	}
	set := Limit{Revision: answer.Revision, Bytes: NoLimit, Charge: uint64(answer.Charge), Overage: uint64(answer.Overage)}
	if answer.Bytes >= 0 {
		set.Bytes = uint64(answer.Bytes)
	}
	return set, nil
}

// Follow stays connected until ctx ends: it calls seen (may be nil) at once, after changes and every few seconds, and takes
// lost budgets again. The log says once that the service is down, and once that it is there again; a server goes on
// meanwhile, by the ledgers and the limits that stay in them.
func (c *Client) Follow(ctx context.Context, seen func(*ServiceStats)) {
	up, said, pause := false, false, serviceRetry
	for ctx.Err() == nil {
		err := c.watch(ctx, func(stats *ServiceStats) error {
			// The connection that holds is another one than this stream's.
			if err := c.do(ctx, func(context.Context) error { return nil }); err != nil {
				return err
			}
			if !up {
				slog.Info("kvcached: connected to the service", "socket", c.socket, "devices", c.shown(stats))
			}
			up, said, pause = true, false, serviceRetry
			if seen != nil {
				seen(stats)
			}
			return nil
		})
		if ctx.Err() != nil {
			return
		}
		if !said {
			slog.Warn("kvcached: no service; going on with the ledger alone, within the limits set in it", "socket", c.socket, "error", err)
		}
		up, said = false, true
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, serviceRetries)
	}
}

func (c *Client) shown(stats *ServiceStats) string {
	var devices []string
	for _, d := range stats.Devices {
		limit := "no limit"
		if d.Limit >= 0 {
			limit = FormatSize(uint64(d.Limit))
		}
		devices = append(devices, fmt.Sprintf("%s: %s", d.Device, limit))
	}
	return strings.Join(devices, ", ")
}

// watch reads the stream of the service, on a connection of its own, until it ends.
func (c *Client) watch(ctx context.Context, seen func(*ServiceStats) error) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return &ServiceDown{c.socket, err}
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()

	_ = conn.SetDeadline(time.Now().Add(serviceWait))
	answer, err := conn.send("WatchStats", map[string]any{"interval_ms": serviceEvery.Milliseconds()})
	if err != nil {
		return &ServiceDown{c.socket, err}
	}
	if answer.StatusCode != http.StatusOK {
		return serviceError(answer)
	}
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, 2*serviceMessage)
	for {
		// Silence for much longer than the interval: the service hangs.
		_ = conn.SetDeadline(time.Now().Add(4 * serviceEvery))
		if !lines.Scan() {
			err := lines.Err()
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return &ServiceDown{c.socket, err}
		}
		stats := &ServiceStats{}
		if err := json.Unmarshal(lines.Bytes(), stats); err != nil {
			return &ServiceDown{c.socket, err}
		}
		if err := seen(stats); err != nil {
			return err
		}
	}
}

// Close gives all budgets up.
func (c *Client) Close() {
	c.turn <- struct{}{}
	defer c.unlock()
	c.leases = nil
	c.drop()
}
