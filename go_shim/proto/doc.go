// Package kvcachedpb is generated from kvcached.proto.
//
// The tools are pinned: grpcio-tools 1.85.1 (a package of the Python index, which brings protoc), protoc-gen-go 1.36.11 and
// protoc-gen-go-grpc 1.6.0. `go generate ./proto` makes the files anew, with python3 and Go on PATH.
package kvcachedpb

//go:generate sh generate.sh
