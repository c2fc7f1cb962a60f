package kvcached

// FirstCells is how many cells of a sequence a model's first batch makes resident, however short it is: llama.cpp's
// attention reads the cache in steps of 256 cells, and every page a kernel may read has to be there. No context is
// smaller: llama.cpp rounds its length up to the same step.
const FirstCells = 256

// HostPage is the page size that libkvcached uses for ordinary memory unless it is told another.
const HostPage = 4096

// Layer is the KV cache of one layer: elements of K and V a cell. Zero where a layer keeps none.
type Layer struct{ K, V uint64 }

// Shape is what decides the size of a KV cache.
type Shape struct {
	Layers  []Layer
	KVType  string // element type of K and V; "" is f16
	Page    uint64 // bytes of a page; 0 is HostPage
	Weights uint64 // bytes of the model's files
}

// Need sums, over K and V of every layer, the pages of one sequence's first cells (all weights count as outside):
//
//	first step = sum over layers of pages(FirstCells * bytes(K row)) + pages(FirstCells * bytes(V row))
//
// with pages() rounding up to whole pages. It is a prediction: what a layer keeps beside K and V (recurrent state, a
// projector's buffers) and the compute buffers are not in it, and the child's own claim takes its place once that is larger.
func (s Shape) Need() Need {
	page := s.Page
	if page == 0 {
		page = HostPage
	}
	need := Need{Weights: s.Weights, Outside: s.Weights}
	for _, layer := range s.Layers {
		for _, elements := range []uint64{layer.K, layer.V} {
			bytes := FirstCells * rowBytes(elements, s.KVType)
			need.FirstStep += (bytes + page - 1) / page * page
		}
	}
	return need
}

// rowBytes is the size of n elements in ggml's storage types that llama-server accepts for its cache. Block types store
// 32 elements together. A type that is not known is counted as f16: llama-server itself refuses it.
func rowBytes(n uint64, kvType string) uint64 {
	blocks := (n + 31) / 32
	switch kvType {
	case "f32":
		return n * 4
	case "q8_0":
		return blocks * 34
	case "q5_1":
		return blocks * 24
	case "q5_0":
		return blocks * 22
	case "q4_1":
		return blocks * 20
	case "q4_0", "iq4_nl":
		return blocks * 18
	}
	return n * 2
}
