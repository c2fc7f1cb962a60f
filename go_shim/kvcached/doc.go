// Package kvcached keeps an Ollama server within a memory budget that all its models share.
//
// The memory itself is mapped by the llama-server children, through libkvcached. This package runs in the server, which
// maps nothing: it opens the library's ledger of each device (one small shared file, no driver, no thread), takes leases in
// them for every child before that child is started, reads from them what each child occupies and lacks, and decides who
// gives way: it alone, among its own children.
//
//	settings        environment, then ~/.ollama/config.yaml, then defaults      LoadSettings
//	manager         the devices, the budget and the caches of one server        Start, Default, Manager
//	cache           one child's leases                                          KVCache.Allocate, Free, Env
//	need            what a model occupies once it has read its first token      Shape.Need
//	admit           room for a model that is to be loaded                       Manager.Admit
//	turns           requests, and models that are to wake                       KVCache.Begin, Awake, End
//	pool            one device: its ledger and who waits there                  Manager.SetDevices, Budget
//	room, victims   who gets room, and what is done to make some
//	sleep           commands to children, timers, unloading                     KVCache.Sleep, Manager.OnUnload
//	report          /api/ps, errors                                             Manager.Stats, LimitError
//	client, budget  kvcachedd, and what is charged where it has other ledgers   Client, Settings.Socket
//
// The library is reached through the Library interface. Its cgo side is generated (zz_generated_cgo_linux.go) and
// registers itself; in a build without it (no cgo, or not Linux) Start returns ErrUnsupported and nothing changes.
//
// # Who waits for what
//
// Two goroutines serve each device: one waits for the ledger's bell, the other looks at the ledger and acts, when the bell
// rang, when something changed here, and once a second. It starts commands and waits for none: each runs on a goroutine of
// its own. Only Admit and Awake block their callers, no longer than their contexts live.
//
// Room is given in order of arrival. A model that waits to wake or to be admitted is served before those that came later;
// claims that children have parked are those of requests under way, and count from when the request came. Room is made by
// trimming idle models' spare memory, by putting idle models to sleep in the policy's order, by having sleepers unloaded
// whose contexts are needed, and, where all that are in use wait for each other, by putting the one to sleep that came last;
// it wakes when its turn comes. A model is no victim while it loads, while a request has it, while its child says that it
// works or that requests wait, nor for two seconds after it woke unless nobody else gets on. Where a model is in use without
// a break, its new requests wait behind one that has waited for five seconds.
//
// # Locks
//
// KVCache.leases, then budget.changing, then Manager.mu, and Manager.opening, then Manager.mu; nothing else is locked under Manager.mu, and
// KVCache.leases and Manager.opening are never held together. KVCache.leases is held while a ledger takes or gives back a
// lease, Manager.opening while one is opened. No lock is held while the ledger is read, while a command or a bell is waited
// for, or while the scheduler is asked to unload a model. So callers may hold locks of their own in Begin, End, Sleep,
// SetPinned and State, which take Manager.mu for a moment, and read no ledger.
//
// Sizes are bytes, times are CLOCK_MONOTONIC. Everything here may be called from several goroutines at once.
package kvcached
