package service

import (
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvpatch.dev/shim/kvcached"
)

// What a ledger answers whose file is gone or was replaced.
var errLedger error = &kvcached.LibraryError{Name: "KVCACHED_E_LEDGER"}

// libraryFailure is an answer of the library, as one of the contract.
type libraryFailure struct {
	*kvcached.LibraryError
	code codes.Code
}

// GRPCStatus is what gRPC sends of it.
func (f *libraryFailure) GRPCStatus() *status.Status { return status.New(f.code, f.Error()) }

func failure(err error) error {
	var known *kvcached.LibraryError
	if !errors.As(err, &known) {
		return status.Error(codes.Internal, err.Error())
	}
	code := codes.Internal
	switch known.Name {
	case "KVCACHED_E_LIMIT", "KVCACHED_E_FULL", "KVCACHED_E_NOMEM":
		code = codes.ResourceExhausted
	case "KVCACHED_E_INVAL":
		code = codes.InvalidArgument
	case "KVCACHED_E_SLOT":
		code = codes.FailedPrecondition
	case "KVCACHED_E_LEDGER":
		code = codes.Unavailable
	}
	return &libraryFailure{known, code}
}
