package service

import (
	"context"
	"errors"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	pb "kvpatch.dev/shim/proto"
)

const (
	// patience is how long a connection may take for a request's header, for a message of a JSON stream to be read, and for
	// what is going on when the service ends.
	patience   = 10 * time.Second
	endWithin  = 2 * time.Second
	maxStreams = 16 // calls at once on a connection of gRPC
	maxHeader  = 8 << 10
)

// Server serves a Service on a unix socket: gRPC where a request is of HTTP/2 and says so, else JSON.
type Server struct {
	service *Service
	policy  Policy
	http    *http.Server
	grpc    *grpc.Server
	end     context.CancelFunc

	number atomic.Uint64
	open   atomic.Int32
	full   atomic.Int64 // when a connection too many was last spoken of, in nanoseconds
}

// NewServer is a server that lets in whom the policy does.
func NewServer(service *Service, policy Policy) *Server {
	base, end := context.WithCancel(context.Background())
	s := &Server{service: service, policy: policy, end: end}
	s.grpc = grpc.NewServer(grpc.MaxRecvMsgSize(MaxMessage), grpc.MaxSendMsgSize(MaxMessage))
	pb.RegisterKVCachedServer(s.grpc, service)
	json := jsonHandler(service)
	s.http = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
				s.grpc.ServeHTTP(w, r)
				return
			}
			json.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: patience,
		IdleTimeout:       -1, // a holder may be silent for as long as it likes
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		Protocols:         new(http.Protocols),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			ctx = withHolder(ctx, c.(*connection).holder)
			return context.WithValue(ctx, openKey{}, &s.open)
		},
		ErrorLog: log.New(quiet{}, "", 0),
	}
	s.http.Protocols.SetHTTP1(true)
	s.http.Protocols.SetUnencryptedHTTP2(true)
	return s
}

// Serve serves until Close.
func (s *Server) Serve(listener *net.UnixListener) error {
	err := s.http.Serve(&admission{UnixListener: listener, server: s})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close ends streams, waits a moment for calls to finish, and closes all connections.
func (s *Server) Close() {
	s.end()
	ctx, cancel := context.WithTimeout(context.Background(), endWithin)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
}

// admission is a listener that hands on those connections that may come in.
type admission struct {
	*net.UnixListener
	server *Server
}

func (a *admission) Accept() (net.Conn, error) {
	for {
		conn, err := a.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if admitted := a.server.admit(conn); admitted != nil {
			return admitted, nil
		}
		_ = conn.Close()
	}
}

// admit makes a holder of a connection; nil: it is to be closed, nothing of it having been read.
func (s *Server) admit(conn *net.UnixConn) net.Conn {
	peer, err := s.policy.admit(conn)
	if err != nil {
		slog.Warn("connection refused", "reason", err)
		return nil
	}
	if s.open.Add(1) > MaxConnections {
		s.open.Add(-1)
		if now, last := time.Now().UnixNano(), s.full.Load(); now-last > int64(time.Second) && s.full.CompareAndSwap(last, now) {
			slog.Warn("connection refused: there are as many as are served", "most", MaxConnections, "user", peer.UID, "process", peer.PID)
		}
		return nil
	}
	return &connection{UnixConn: conn, server: s, holder: &holder{peer: peer, number: s.number.Add(1)}}
}

// connection drops what its holder holds when it is closed, whoever closes it.
type connection struct {
	*net.UnixConn
	server *Server
	holder *holder
	once   sync.Once
}

func (c *connection) Close() error {
	err := c.UnixConn.Close()
	c.once.Do(func() {
		c.server.open.Add(-1)
		c.server.service.leases.end(c.holder)
	})
	return err
}

type openKey struct{}

// connectionsOf is the number of connections of the server that a request came to.
func connectionsOf(ctx context.Context) int32 {
	if open, ok := ctx.Value(openKey{}).(*atomic.Int32); ok {
		return open.Load()
	}
	return 0
}

// quiet has net/http's notes about single connections in the log at debug level.
type quiet struct{}

func (quiet) Write(p []byte) (int, error) {
	slog.Debug(strings.TrimSpace(string(p)))
	return len(p), nil
}
