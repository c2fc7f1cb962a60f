package kvcached

// CUDAContext is what a process's context takes on an NVIDIA GPU before anything is put there, as measured on an H200. It
// stands in until a child has measured its own.
const CUDAContext = 527 << 20

// Need is what a model occupies on a device once it is loaded and has read its first token, by kind. Sizes are bytes.
type Need struct {
	Weights   uint64 // bytes of the model's files, each once
	FirstStep uint64 // KV cache and recurrent state that the first batch maps
	Compute   uint64 // compute buffers: an estimate that is meant to be enough; 0 where only llama.cpp knows
	Context   uint64 // a process's own on each GPU that it uses; 0 in host memory
	Outside   uint64 // of the weights, bytes that the child holds outside the library and does not claim itself
	Reserved  uint64 // KV cache and recurrent state with the whole context in use; not part of Total
	Inexact   string // why FirstStep and Reserved are upper estimates; "" where they are exact
}

// Total is the size of the lease that covers the need.
func (n Need) Total() uint64 { return n.Weights + n.FirstStep + n.Compute + n.Context }

// Fixed is the part of the lease that no claim of the child uses up.
func (n Need) Fixed() uint64 { return n.Outside + n.Context }

// Split divides the need among devices in proportion to parts (free bytes, or layers). A part of 0 gets nothing. Each of
// the others has a context of its own and its own compute buffers; shares are rounded up, so that their sum is enough.
func (n Need) Split(parts []uint64) []Need {
	var whole float64
	for _, part := range parts {
		whole += float64(part)
	}
	shares := make([]Need, len(parts))
	for i, part := range parts {
		if part == 0 {
			continue
		}
		fraction := float64(part) / whole
		share := func(bytes uint64) uint64 {
			if fraction == 1 {
				return bytes
			}
			return min(bytes, uint64(float64(bytes)*fraction)+1)
		}
		shares[i] = Need{
			Weights: share(n.Weights), FirstStep: share(n.FirstStep), Outside: share(n.Outside), Reserved: share(n.Reserved),
			Compute: n.Compute, Context: n.Context, Inexact: n.Inexact,
		}
	}
	return shares
}
