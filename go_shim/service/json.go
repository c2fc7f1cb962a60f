package service

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "kvpatch.dev/shim/proto"
)

// jsonHandler serves the contract's methods as JSON, at the paths that they have in gRPC. The stream is a line a message.
func jsonHandler(s *Service) http.Handler {
	mux := http.NewServeMux()
	handle := func(method string, h http.HandlerFunc) {
		mux.HandleFunc("POST /"+pb.KVCached_ServiceDesc.ServiceName+"/"+method, h)
	}
	handle("Allocate", unary(s.Allocate))
	handle("Free", unary(s.Free))
	handle("GetStats", unary(s.GetStats))
	handle("SetLimit", unary(s.SetLimit))
	handle("WatchStats", s.watchJSON)
	return mux
}

func unary[Request, Answer any, R message[Request], A message[Answer]](call func(context.Context, R) (A, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		request := R(new(Request))
		if err := read(w, r, request); err != nil {
			refuse(w, err)
			return
		}
		answer, err := call(r.Context(), request)
		if err != nil {
			refuse(w, err)
			return
		}
		text, err := jsonOut.Marshal(answer)
		if err != nil {
			refuse(w, status.Error(codes.Internal, err.Error()))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(text, '\n'))
	}
}

// message is a generated message, by its pointer.
type message[M any] interface {
	*M
	proto.Message
}

func read(w http.ResponseWriter, r *http.Request, request proto.Message) error {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return status.Errorf(codes.InvalidArgument, "Content-Type %q: application/json is needed", r.Header.Get("Content-Type"))
	}
	// Else a body that trickles in would hold its connection's place.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(patience))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxMessage))
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return status.Errorf(codes.ResourceExhausted, "the message is larger than %d bytes", MaxMessage)
	case err != nil:
		return status.Errorf(codes.InvalidArgument, "the message cannot be read: %v", err)
	}
	if err := protojson.Unmarshal(body, request); err != nil {
		return status.Errorf(codes.InvalidArgument, "the message is not of the contract: %v", err)
	}
	return nil
}

func (s *Service) watchJSON(w http.ResponseWriter, r *http.Request) {
	request := &pb.StatsRequest{}
	if err := read(w, r, request); err != nil {
		refuse(w, err)
		return
	}
	control, began := http.NewResponseController(w), false
	err := s.watch(r.Context(), request, func(answer *pb.StatsResponse) error {
		text, err := jsonOut.Marshal(answer)
		if err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		if !began {
			w.Header().Set("Content-Type", "application/x-ndjson")
			began = true
		}
		// Who does not read loses the connection.
		_ = control.SetWriteDeadline(time.Now().Add(patience))
		if _, err := w.Write(append(text, '\n')); err != nil {
			return err
		}
		return control.Flush()
	})
	if err != nil && !began {
		refuse(w, err)
	}
}

// Names and HTTP status of what the service answers with, as the Connect protocol has them.
var answers = map[codes.Code]struct {
	name   string
	status int
}{
	codes.Canceled:           {"canceled", 499},
	codes.InvalidArgument:    {"invalid_argument", http.StatusBadRequest},
	codes.DeadlineExceeded:   {"deadline_exceeded", http.StatusGatewayTimeout},
	codes.NotFound:           {"not_found", http.StatusNotFound},
	codes.PermissionDenied:   {"permission_denied", http.StatusForbidden},
	codes.ResourceExhausted:  {"resource_exhausted", http.StatusTooManyRequests},
	codes.FailedPrecondition: {"failed_precondition", http.StatusBadRequest},
	codes.Unavailable:        {"unavailable", http.StatusServiceUnavailable},
	codes.Internal:           {"internal", http.StatusInternalServerError},
}

func refuse(w http.ResponseWriter, err error) {
	known, ok := answers[status.Code(err)]
	if !ok {
		known = answers[codes.Internal]
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(known.status)
	text := map[string]string{"code": known.name, "message": status.Convert(err).Message()}
	var failed *libraryFailure
	if errors.As(err, &failed) {
		text["reason"] = failed.Name
	}
	_ = json.NewEncoder(w).Encode(text)
}
