package kvcached

import "os"

// OpenLibrary loads the libkvcached of the first directory that has one. It returns ErrUnsupported in a build without the
// library's glue. Programs beside Ollama that work on the ledgers start here.
func OpenLibrary(directories []string) (Library, error) {
	if openLibrary == nil {
		return nil, ErrUnsupported
	}
	path, err := findLibrary(directories)
	if err != nil {
		return nil, err
	}
	return openLibrary(path)
}

// GPU is a GPU of NVIDIA's driver.
type GPU struct {
	BusID string // as the kernel writes it
	UUID  string
}

// GPUs lists those whose UUID the driver tells, by bus id.
func GPUs() []GPU {
	entries, err := os.ReadDir(procGPUs)
	if err != nil {
		return nil
	}
	var found []GPU
	for _, entry := range entries {
		if uuid := gpuUUID(entry.Name()); uuid != "" {
			found = append(found, GPU{BusID: busID(entry.Name()), UUID: uuid})
		}
	}
	return found
}

// BusID writes a PCI bus id as the kernel does.
func BusID(id string) string { return busID(id) }
