#!/bin/sh
# Makes kvcached.pb.go and kvcached_grpc.pb.go of kvcached.proto, beside it or in the folder $1, with tools of fixed versions
# that are kept in a folder of their own (removed at the end).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$here}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools/venv"
"$tools/venv/bin/pip" install --quiet --disable-pip-version-check grpcio-tools==1.85.1
GOBIN="$tools" GOFLAGS= go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.11
GOBIN="$tools" GOFLAGS= go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.0
PATH="$tools:$PATH" "$tools/venv/bin/python" -m grpc_tools.protoc -I "$here" \
  --go_out="$target" --go_opt=paths=source_relative \
  --go-grpc_out="$target" --go-grpc_opt=paths=source_relative \
  kvcached.proto
