package kvcached

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// HostID is the ID of the device that stands for the machine's own memory.
const HostID = "host"

// Device is memory with a ledger and a limit of its own. Sizes are bytes; 0 where they are not known.
type Device struct {
	ID    string // HostID, or the PCI bus id of a GPU
	Name  string // as llama.cpp calls it: CPU, CUDA0
	Total uint64
	Free  uint64
}

// procGPUs has a directory for each GPU of NVIDIA's driver, by bus id.
var procGPUs = "/proc/driver/nvidia/gpus"

// The part of a GPU that models may have where the user gave no limit; the rest is for what the driver takes itself.
const defaultPercent = 95

// busID writes a PCI bus id as the kernel does: lower case, with a domain of four digits.
func busID(id string) string {
	id = strings.ToLower(strings.TrimSpace(id))
	if domain, rest, ok := strings.Cut(id, ":"); ok && len(domain) == 8 && strings.Count(rest, ":") == 1 {
		return domain[4:] + ":" + rest
	}
	return id
}

// gpuUUID is the UUID of the GPU with a bus id, "" where the driver does not tell.
func gpuUUID(id string) string {
	text, err := os.ReadFile(filepath.Join(procGPUs, id, "information"))
	if err != nil {
		return ""
	}
	for _, line := range strings.Split(string(text), "\n") {
		name, value, _ := strings.Cut(line, ":")
		if value = strings.TrimSpace(value); strings.TrimSpace(name) == "GPU UUID" && strings.HasPrefix(value, "GPU-") && !strings.Contains(value, "?") {
			return value
		}
	}
	return ""
}

// ledgerPath is where the ledger of a GPU is: beside the host's where one was named for this server; else where every
// process of this user looks for it.
func (m *Manager) ledgerPath(id string) (string, error) {
	if m.named != "" {
		return m.named + "." + id, nil
	}
	if uuid := gpuUUID(id); uuid != "" {
		return m.library.LedgerPath(uuid)
	}
	return m.host.ledger.Path() + "." + id, nil
}

// SetDevices tells the manager which GPUs there are. It opens the ledger of each, once. From the first GPU on the limit is
// the GPUs', and host memory has none. A GPU whose ledger cannot be opened is reported and has no budget: models on it are
// admitted as in stock Ollama.
func (m *Manager) SetDevices(devices []Device) {
	for _, device := range devices {
		if _, err := m.poolOf(device); err != nil {
			slog.Warn("kvcached: no budget for a device; models on it are not managed", "device", device.ID, "name", device.Name, "error", err)
		}
	}
}

// poolOf finds the budget of a device, and opens it the first time.
func (m *Manager) poolOf(device Device) (*pool, error) {
	if device.ID == HostID || device.ID == "" {
		return m.host, nil
	}
	device.ID = busID(device.ID)

	m.opening.Lock()
	defer m.opening.Unlock()
	m.mu.Lock()
	i := slices.IndexFunc(m.pools, func(p *pool) bool { return p.device.ID == device.ID })
	if i >= 0 {
		p := m.pools[i]
		p.update(device)
		m.mu.Unlock()
		return p, nil
	}
	m.mu.Unlock()

	path, err := m.ledgerPath(device.ID)
	if err != nil {
		return nil, err
	}
	ledger, err := m.library.OpenLedger(path)
	if err != nil {
		return nil, fmt.Errorf("cannot open the ledger of %s: %w", device.ID, err)
	}
	p := m.newPool(device, ledger)
	p.limit, p.source = m.deviceLimit(device)
	m.mu.Lock()
	if m.over {
		m.mu.Unlock()
		return nil, errClosed
	}
	m.pools = append(m.pools, p)
	if !m.host.changed {
		m.host.limit, m.host.source = NoLimit, ""
	}
	m.startPool(p)
	limit, source := p.limit, p.source
	m.mu.Unlock()
	slog.Info("kvcached: device", "device", device.ID, "name", device.Name, "ledger", path, "limit", sizeOrNone(limit), "set_by", source)
	return p, nil
}

// Budget is the limit in force on a device, NoLimit for none, and what this server's models are charged there.
func (m *Manager) Budget(device Device) (limit, charged uint64, err error) {
	p, err := m.poolOf(device)
	if err != nil {
		return 0, 0, err
	}
	v, err := p.look()
	if err != nil {
		return 0, 0, err
	}
	m.mu.Unlock()
	return v.most, v.charge, nil
}

// deviceLimit is what models may have together on a GPU, and who says so.
func (m *Manager) deviceLimit(device Device) (uint64, string) {
	if m.settings.Limit != NoLimit || device.Total == 0 {
		return m.settings.Limit, m.settings.Source
	}
	return device.Total / 100 * defaultPercent, fmt.Sprintf("the default of %d %% of the GPU", defaultPercent)
}

func sizeOrNone(bytes uint64) string {
	if bytes == NoLimit {
		return "none"
	}
	return FormatSize(bytes)
}
