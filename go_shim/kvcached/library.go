package kvcached

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// LibraryName is the file that holds libkvcached.
const LibraryName = "libkvcached.so"

// Library is the part of libkvcached that a server needs. Its calls never load a device driver or start a thread.
type Library interface {
	Version() string
	// OpenLedger opens the ledger at path, or the user's own for "".
	OpenLedger(path string) (Ledger, error)
}

// Ledger is an open ledger, for the life of the process: its leases end with the process, however that ends. Calls may be
// made from several goroutines. One that fails returns a *LibraryError.
type Ledger interface {
	Path() string
	// Lease sets size bytes aside for a child in a slot of its own, fixed of them for what it holds outside the library.
	// It fails with ErrLimit when the charges of the group's slots and size exceed limit.
	Lease(group, name string, size, fixed, limit uint64) (slot int, err error)
	// Unlease drops the lease; a slot that a process still uses ends with that process.
	Unlease(slot int) error
	// Slots lists the slots alive, of every group.
	Slots() ([]Slot, error)
}

// Slot is a process's entry in the ledger. Sizes are bytes; Charge is what counts against the limit.
type Slot struct {
	Index    int
	PID      int64 // the child's once it is attached, the lessor's before; for display
	Name     string
	Group    string
	Lease    uint64
	Fixed    uint64
	Claim    uint64 // mapped through the library, of all kinds
	KV       uint64 // of the claim: KV caches and recurrent state
	Weights  uint64 // of the claim
	Compute  uint64 // of the claim
	Reserved uint64 // address space, of all kinds
	Charge   uint64 // max(Lease, Fixed + Claim)
	Leased   bool
	Attached bool
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

// ErrLimit is the library's answer to a lease that does not fit.
var ErrLimit error = &LibraryError{Name: "KVCACHED_E_LIMIT"}

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
