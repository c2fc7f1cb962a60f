package kvcached

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"
)

func (c *Client) lock(ctx context.Context) error {
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *Client) unlock() { <-c.turn }

// drop: held turn.
func (c *Client) drop() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
	for _, lease := range c.leases {
		lease.handle = 0
	}
}

// do runs f in turn, connected.
func (c *Client) do(ctx context.Context, f func(context.Context) error) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, serviceWait)
		defer cancel()
	}
	if err := c.lock(ctx); err != nil {
		return &ServiceDown{c.socket, err}
	}
	defer c.unlock()
	if !c.conn.alive() {
		c.drop()
		conn, err := c.dial(ctx)
		if err != nil {
			return &ServiceDown{c.socket, err}
		}
		c.conn = conn
	}
	for _, lease := range c.leases {
		if lease.handle != 0 {
			continue
		}
		if err := c.finish(c.allocate(ctx, lease)); err != nil {
			if c.conn == nil {
				return err
			}
			// It stays without until there is room: its memory is in use whatever the service says.
			slog.Warn("kvcached: a budget cannot be taken again at the service", "model", lease.request.Model, "size", FormatSize(uint64(lease.request.Size)), "error", err)
		}
	}
	return c.finish(f(ctx))
}

// exchange: held turn, connected.
func (c *Client) exchange(ctx context.Context, method string, request, answer any) error {
	return c.finish(c.conn.call(ctx, method, request, answer))
}

// finish closes a connection that did not carry a call through, and makes an error of it. Held: turn.
func (c *Client) finish(err error) error {
	var answered *ServiceError
	if err == nil || errors.As(err, &answered) {
		return err
	}
	c.drop()
	return &ServiceDown{c.socket, err}
}

// serviceConn is a connection that speaks HTTP/1.1, one call at a time.
type serviceConn struct {
	*net.UnixConn
	reader *bufio.Reader
}

func (c *Client) dial(ctx context.Context) (*serviceConn, error) {
	conn, err := (&net.Dialer{Timeout: serviceWait}).DialContext(ctx, "unix", c.socket)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // what it says before names the socket again
		}
		return nil, err
	}
	unix := conn.(*net.UnixConn)
	if err := checkPeer(unix, c.socket, c.group); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &serviceConn{unix, bufio.NewReader(unix)}, nil
}

// alive looks whether the other end has closed the connection. Nothing is to be read: no call is under way.
func (c *serviceConn) alive() bool {
	if c == nil {
		return false
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := c.reader.Peek(1)
	_ = c.SetReadDeadline(time.Time{})
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func (c *serviceConn) send(method string, request any) (*http.Response, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	call, err := http.NewRequest(http.MethodPost, "http://kvcached"+servicePath+method, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	call.Header.Set("Content-Type", "application/json")
	if err := call.Write(c); err != nil {
		return nil, err
	}
	return http.ReadResponse(c.reader, call)
}

func (c *serviceConn) call(ctx context.Context, method string, request, answer any) error {
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	err := c.roundTrip(method, request, answer)
	if !stop() && err == nil {
		err = ctx.Err() // the deadline just set would meet the next call
	}
	return err
}

func (c *serviceConn) roundTrip(method string, request, answer any) error {
	response, err := c.send(method, request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return serviceError(response)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, 2*serviceMessage))
	if err != nil {
		return err
	}
	return json.Unmarshal(text, answer)
}

// serviceError reads what the service refused a call with.
func serviceError(response *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(response.Body, serviceMessage))
	if err != nil {
		return err
	}
	refused := &ServiceError{}
	if json.Unmarshal(text, refused) != nil || refused.Code == "" {
		return fmt.Errorf("it answers with status %d, which is not kvcachedd's way", response.StatusCode)
	}
	return refused
}
