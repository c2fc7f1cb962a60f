package kvcached

import (
	"os"
	"path/filepath"
	"testing"
)

func TestBusID(t *testing.T) {
	for id, want := range map[string]string{
		"0000:1B:00.0": "0000:1b:00.0", "00000000:1B:00.0": "0000:1b:00.0", " 0001:01:00.0\n": "0001:01:00.0", "host": "host",
	} {
		if got := busID(id); got != want {
			t.Errorf("busID(%q) = %q, want %q", id, got, want)
		}
	}
}

func TestLedgerOfAGPU(t *testing.T) {
	defer func(path string) { procGPUs = path }(procGPUs)
	procGPUs = t.TempDir()
	for id, text := range map[string]string{
		"0000:1b:00.0": "Model: \t\t NVIDIA H200\nIRQ:   \t\t 123\nGPU UUID: \t GPU-01234567-89ab-cdef-0123-456789abcdef\nVideo BIOS: \t ??\n",
		"0000:2b:00.0": "GPU UUID: \t GPU-????????-????-????-????-????????????\n",
		"0000:3b:00.0": "nothing of it\n",
	} {
		if err := os.MkdirAll(filepath.Join(procGPUs, id), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(procGPUs, id, "information"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	manager, _ := fakeManager(t, NoLimit)
	for id, want := range map[string]string{
		"0000:1b:00.0": "/dev/shm/fake-GPU-01234567-89ab-cdef-0123-456789abcdef",
		"0000:2b:00.0": "/dev/shm/fake.0000:2b:00.0", // the driver does not know yet
		"0000:3b:00.0": "/dev/shm/fake.0000:3b:00.0",
		"0000:4b:00.0": "/dev/shm/fake.0000:4b:00.0",
	} {
		if got, err := manager.ledgerPath(id); got != want || err != nil {
			t.Errorf("%s: %q, %v, want %q", id, got, err, want)
		}
	}
	manager.named = "/tmp/own"
	if got, err := manager.ledgerPath("0000:1b:00.0"); got != "/tmp/own.0000:1b:00.0" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestPolicies(t *testing.T) {
	for _, name := range []string{"", PolicyLRU} {
		if policy, err := policyNamed(name); err != nil || policy.Name() != PolicyLRU {
			t.Errorf("%q: %v, %v", name, policy, err)
		}
	}
	if _, err := policyNamed("random"); err == nil {
		t.Error("an unknown policy passes")
	}
	if _, err := Open(Settings{Enabled: true, Policy: "random"}, &fakeLibrary{ledger: newFakeLedger("x")}, ""); err == nil {
		t.Error("a manager with an unknown policy")
	}
	old, young := Victim{Model: "b", LastUse: 1}, Victim{Model: "a", LastUse: 2}
	if (lru{}).Compare(old, young) >= 0 || (lru{}).Compare(young, old) <= 0 || (lru{}).Compare(old, old) != 0 || (lru{}).Compare(old, Victim{Model: "c", LastUse: 1}) >= 0 {
		t.Error("not by last use, then by model")
	}
}
