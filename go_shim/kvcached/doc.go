// Package kvcached keeps an Ollama server within a memory budget that all its models share.
//
// The memory itself is mapped by the llama-server children, through libkvcached. This package runs in the server, which
// maps nothing: it opens the library's ledger (one small shared file, no driver, no thread), takes a lease in it for
// every child before that child is started, and reads from it what each child occupies.
//
//	settings   environment, then ~/.ollama/config.yaml, then defaults          LoadSettings
//	manager    the ledger, the budget and the caches of one server              Start, Default
//	cache      one child's lease                                                KVCache.Allocate, Free, Env
//	need       what a model occupies before its first token                     Shape.Need
//
// The library is reached through the Library interface. Its cgo side is generated (zz_generated_cgo_linux.go) and
// registers itself; in a build without it (no cgo, or not Linux) Start returns ErrUnsupported and nothing changes.
//
// Sizes are bytes. Everything here may be called from several goroutines at once.
package kvcached
