package kvcached

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// LibraryName is the file that holds libkvcached.
const LibraryName = "libkvcached.so"

// Library is the part of libkvcached that a server needs. Its calls never load a device driver or start a thread.
type Library interface {
	Version() string
	// OpenLedger opens the ledger at path, or that of host memory for "".
	OpenLedger(path string) (Ledger, error)
	// LedgerPath is where the ledger of a device is by default: "host", or the UUID of a GPU.
	LedgerPath(device string) (string, error)
	// Monotonic is the clock (CLOCK_MONOTONIC) that the times in a Slot are of.
	Monotonic() time.Duration
}

// Command is what a process can be told to do, by its slot.
type Command int

// Commands.
const (
	CommandTrim   Command = 1 // give memory back that holds nothing
	CommandSleep  Command = 2 // give all memory back, keep content in host memory
	CommandWake   Command = 3
	CommandRefuse Command = 4 // claims that are parked fail now
)

func (c Command) String() string {
	switch c {
	case CommandTrim:
		return "trim"
	case CommandSleep:
		return "sleep"
	case CommandWake:
		return "wake"
	case CommandRefuse:
		return "refuse"
	}
	return fmt.Sprintf("command %d", int(c))
}

// Ledger is an open ledger, for the life of the process: its leases end with the process, however that ends. Calls may be
// made from several goroutines. One that fails returns a *LibraryError. Command and Wait block; the others do not, but that
// a Lease may wait about a second for another process's claim to settle.
type Ledger interface {
	Path() string
	// Lease sets size bytes aside for a child in a slot of its own, fixed of them for what it holds outside the library.
	// It fails with ErrLimit when the charges of the group's slots and size exceed limit.
	Lease(group, name string, size, fixed, limit uint64) (slot int, err error)
	// Unlease drops the lease; a slot that a process still uses ends with that process.
	Unlease(slot int) error
	// Slots lists the slots alive, of every group.
	Slots() ([]Slot, error)
	// Command has the process in a slot do something, and waits for its answer: the bytes given back, and its own result.
	Command(slot int, command Command, wait time.Duration) (freed uint64, err error)
	// Wait blocks until the ledger's bell has rung since the count seen, or timeout has passed, and returns the count now.
	Wait(seen uint32, timeout time.Duration) (uint32, error)
	// SetLimit sets the limit of a group that has a live slot, or of all groups together for "". NoLimit removes it.
	SetLimit(group string, bytes uint64) (Limit, error)
	// Limit is what was set for a group in the ledger, or for all groups together for "".
	Limit(group string) (Limit, error)
}

// Kinds of memory, the indexes of a Slot's KindReserved and KindAsleep.
const (
	KindKV = iota
	KindWeights
	KindCompute
)

// Slot is a process's entry in the ledger. Sizes are bytes; Charge is what counts against the limit.
type Slot struct {
	Index    int
	PID      int64 // the child's once it is attached, the lessor's before; for display
	Name     string
	Group    string
	Lease    uint64
	Fixed    uint64 // held outside the library, Context included
	Context  uint64 // what the process's context on a GPU takes, as measured by it
	Claim    uint64 // mapped through the library, of all kinds
	KV       uint64 // of the claim: KV caches and recurrent state
	Weights  uint64 // of the claim
	Compute  uint64 // of the claim
	Idle     uint64 // of the claim: holds nothing, a trim gives it back
	Pooled   uint64 // of the claim: kept beside the regions, a trim gives it back
	Reserved uint64 // address space, of all kinds
	Charge   uint64 // max(Lease, Fixed + Claim)

	Asleep       uint64 // bytes of sleeping pages: what a wake needs
	HostBytes    uint64 // host memory held for sleeping content
	KindReserved [3]uint64
	KindAsleep   [3]uint64

	Limit      uint64 // of the group as this slot knows it
	Wants      uint64 // bytes that a claim lacks which waits for room (is parked); 0 for none
	WantsSince time.Duration
	LastUse    time.Duration
	Woke       time.Duration // of the last wake; 0 for never
	Inside     uint32        // threads that work with the memory
	Queued     uint32        // requests that wait
	Parked     uint32        // threads that wait for room

	Leased     bool
	Attached   bool
	Controlled bool // it answers commands
}

// Limit is a limit set in the ledger.
type Limit struct {
	Revision uint32 // 0: none was set
	Bytes    uint64 // NoLimit for none
	Charge   uint64 // of the slots that it covers
	Overage  uint64 // charge above it
}

// LibraryError is a failed call of libkvcached.
type LibraryError struct {
	Code   int    // negative
	Name   string // KVCACHED_E_...
	Text   string // the code's sentence
	Detail string // numbers and names of this failure, may be empty
}

func (e *LibraryError) Error() string {
	text := fmt.Sprintf("libkvcached: %s (%s)", e.Text, e.Name)
	if e.Detail != "" {
		text += ": " + e.Detail
	}
	return text
}

// Is compares by name, so that errors.Is(err, ErrLimit) holds for any detail.
func (e *LibraryError) Is(target error) bool {
	other, ok := target.(*LibraryError)
	return ok && other.Name == e.Name
}

// Answers of the library that decisions depend on.
var (
	ErrLimit     error = &LibraryError{Name: "KVCACHED_E_LIMIT"}      // the limit has no room
	ErrShort     error = &LibraryError{Name: "KVCACHED_E_NOMEM"}      // the device, or the host, has none
	ErrHostLimit error = &LibraryError{Name: "KVCACHED_E_HOST_LIMIT"} // no host memory for what is to sleep
	ErrBusy      error = &LibraryError{Name: "KVCACHED_E_BUSY"}
	ErrTimeout   error = &LibraryError{Name: "KVCACHED_E_TIMEOUT"} // no answer in time
	ErrSlot      error = &LibraryError{Name: "KVCACHED_E_SLOT"}    // the process has ended, or answers no commands
)

// ErrUnsupported is returned by Start in a build that has no way to libkvcached: nothing is loaded or changed.
var ErrUnsupported = errors.New("this build of ollama cannot use libkvcached (it needs Linux and cgo); models are run as in stock Ollama")

// openLibrary loads libkvcached from a file and checks its ABI. The generated cgo file sets it.
var openLibrary func(path string) (Library, error)

// findLibrary returns the first directory's libkvcached, or an error that lists where it was looked for.
func findLibrary(directories []string) (string, error) {
	var checked []string
	for _, directory := range directories {
		if directory == "" {
			continue
		}
		path := filepath.Join(directory, LibraryName)
		info, err := os.Stat(path)
		if err == nil && info.Mode().IsRegular() {
			return path, nil
		}
		checked = append(checked, path)
	}
	return "", fmt.Errorf("%s not found (checked: %s); install it beside llama-server, or set %s=false",
		LibraryName, strings.Join(checked, ", "), EnabledVariable)
}
