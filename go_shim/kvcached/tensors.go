package kvcached

import "fmt"

const (
	cellStep     = 256 // cells to which a context is rounded up, and in which attention reads it
	maxSequences = 256 // LLAMA_MAX_SEQ
)

// kvTypes are the element types that llama-server takes for a cache: elements and bytes of a block.
var kvTypes = map[string][2]uint64{
	"f32": {1, 4}, "f16": {1, 2}, "bf16": {1, 2}, "q8_0": {32, 34}, "q5_1": {32, 24}, "q5_0": {32, 22},
	"q4_1": {32, 20}, "q4_0": {32, 18}, "iq4_nl": {32, 18},
}

func quantised(kvType string) bool { return kvTypes[kvType][0] > 1 }

// rowBytes is the size of n elements; those that are no whole number of blocks are rounded up (ggml stops on them). A type that
// is not known counts as f16: llama-server refuses it.
func rowBytes(n uint64, kvType string) uint64 {
	block, ok := kvTypes[kvType]
	if !ok {
		block = kvTypes["f16"]
	}
	return (n + block[0] - 1) / block[0] * block[1]
}

// pad rounds n up to a multiple.
func pad(n, multiple uint64) uint64 { return (n + multiple - 1) / multiple * multiple }

// DeviceKind is how a kind of device lays tensors out.
type DeviceKind struct {
	Alignment  uint64 // of a tensor, in bytes
	RowPadding uint64 // elements to whose multiple the end of a quantised tensor is padded; 0 for none
	Page       uint64 // of libkvcached, in bytes
}

// The kinds: ggml-cuda pads by its MATRIX_ROW_PADDING.
var (
	HostMemory = DeviceKind{Alignment: 32, Page: HostPage}
	CUDAMemory = DeviceKind{Alignment: 128, RowPadding: 512, Page: 2 << 20}
)

// Context is what a model's caches depend on besides the model, as llama-server takes it.
type Context struct {
	Cells          uint64 // -c: of all sequences together; 0: as many as the model was trained on
	Parallel       uint64 // -np
	Unified        bool   // -kvu: one stream of cells for all sequences
	TypeK, TypeV   string // -ctk, -ctv; "" is f16
	FlashAttention bool
	Batch, Ubatch  uint64 // -b, -ub
	SWAFull        bool   // --swa-full
}

// cacheTensor is one tensor of a cache. spread: a cell's elements lie apart (V without flash attention). A recurrent state has
// sequences in place of cells, each mapped from the start.
type cacheTensor struct {
	kind                string
	row, cells, streams uint64
	spread, state       bool
}

func (t cacheTensor) cellBytes() uint64 { return rowBytes(t.row, t.kind) }

// bytes are those in a buffer of the device, before alignment (get_alloc_size).
func (t cacheTensor) bytes(device DeviceKind) uint64 {
	size := t.cellBytes() * t.cells * t.streams
	if device.RowPadding > 0 && quantised(t.kind) && t.row%device.RowPadding != 0 {
		size += rowBytes(device.RowPadding-t.row%device.RowPadding, t.kind)
	}
	return size
}

// mapped are the bytes of whole pages under the first n cells of one stream.
func (t cacheTensor) mapped(device DeviceKind, n uint64) uint64 {
	n = min(pad(n, cellStep), t.cells)
	if t.spread && n > 0 || t.state {
		n = t.cells
	}
	if n == 0 || t.row == 0 {
		return 0
	}
	end := n * t.cellBytes()
	if device.RowPadding > 0 && quantised(t.kind) {
		end += rowBytes(device.RowPadding, t.kind) // kernels read a tile beyond the last row
	}
	return min(pad(end, device.Page), pad(t.bytes(device), device.Page))
}

// Caches are all tensors of one context's caches, with llama.cpp's limits applied.
type Caches struct {
	Cells    uint64 // of all sequences
	Sequence uint64 // that one sequence can have
	Ubatch   uint64
	tensors  []cacheTensor
}

// Bytes is what llama.cpp allocates on a device: each tensor rounded up to the alignment.
func (c *Caches) Bytes(device DeviceKind) uint64 {
	var sum uint64
	for _, tensor := range c.tensors {
		sum += pad(tensor.bytes(device), device.Alignment)
	}
	return sum
}

// Reserved is the address space that libkvcached sets aside: every tensor begins on a page.
func (c *Caches) Reserved(device DeviceKind) uint64 {
	var sum uint64
	for _, tensor := range c.tensors {
		sum += pad(tensor.bytes(device), device.Page)
	}
	return sum
}

// Mapped is what is mapped once one sequence has so many tokens and no other has any.
func (c *Caches) Mapped(device DeviceKind, tokens uint64) uint64 {
	var sum uint64
	for _, tensor := range c.tensors {
		sum += tensor.mapped(device, tokens)
	}
	return sum
}

// Plan lays out the caches that llama_init_from_model makes, and says why where it would refuse.
func (m *Model) Plan(c Context) (*Caches, error) {
	if err := m.check(&c); err != nil {
		return nil, err
	}
	asked := c.Cells
	if asked == 0 {
		asked = m.trained
	}
	batch := c.Batch
	if m.causal {
		batch = min(asked, batch)
	}
	ubatch := c.Ubatch
	if ubatch == 0 {
		ubatch = c.Batch
	}
	caches := &Caches{Cells: pad(asked, cellStep), Ubatch: min(batch, ubatch)}
	caches.Sequence = caches.Cells
	if !c.Unified {
		caches.Sequence = pad(caches.Cells/c.Parallel, cellStep)
		if caches.Sequence == 0 {
			return nil, fmt.Errorf("a context of %d cells leaves none for each of %d sequences", asked, c.Parallel)
		}
		caches.Cells = caches.Sequence * c.Parallel
	}
	caches.tensors = m.tensors(c, caches.Sequence, caches.Ubatch)
	for _, tensor := range caches.tensors {
		if block := kvTypes[tensor.kind][0]; tensor.row%block != 0 {
			return nil, fmt.Errorf("a row of %d elements cannot be %s, whose blocks hold %d", tensor.row, tensor.kind, block)
		}
	}
	return caches, nil
}

// check does the checks and changes of llama_init_from_model.
func (m *Model) check(c *Context) error {
	for _, kind := range []*string{&c.TypeK, &c.TypeV} {
		if *kind == "" {
			*kind = "f16"
		}
		if _, ok := kvTypes[*kind]; !ok {
			return fmt.Errorf("%q is no type of a KV cache", *kind)
		}
	}
	if m.arch == "grok" {
		c.FlashAttention = false
	}
	switch {
	case c.Batch == 0:
		return fmt.Errorf("a batch of 0 tokens")
	case c.Cells == 0 && m.trained == 0:
		return fmt.Errorf("the file names no context length")
	case c.Parallel == 0 || c.Parallel > maxSequences:
		return fmt.Errorf("%d sequences: llama.cpp takes 1 to %d", c.Parallel, maxSequences)
	case m.mla && c.TypeK != c.TypeV:
		return fmt.Errorf("this model caches K and V together, so that both must be of one type")
	case quantised(c.TypeV) && !c.FlashAttention:
		return fmt.Errorf("a V cache of type %s needs flash attention", c.TypeV)
	}
	if c.FlashAttention {
		for _, layer := range m.layers[:m.main()] {
			if layer.headK%kvTypes[c.TypeK][0] != 0 || layer.headV%kvTypes[c.TypeV][0] != 0 {
				return fmt.Errorf("blocks of %s and %s do not divide a head's %d and %d elements", c.TypeK, c.TypeV, layer.headK, layer.headV)
			}
		}
	}
	return nil
}

// tensors follows llama_model::create_memory.
func (m *Model) tensors(c Context, cells, ubatch uint64) []cacheTensor {
	every := func(int, modelLayer) bool { return true }
	indexed := func(_ int, layer modelLayer) bool { return layer.indexer }
	switch {
	case archCacheless.has(m.arch):
		return nil
	case archRecurrent.has(m.arch):
		return m.states(c, every)
	case archDSA.has(m.arch):
		proper := func(i int, _ modelLayer) bool { return m.nextn == 0 || i < m.main() }
		return append(m.attention(c, cells, proper), m.withIndexer().attention(c, cells, indexed)...)
	case archMSA.has(m.arch):
		return append(m.attention(c, cells, every), m.withIndexer().attention(c, cells, indexed)...)
	}

	chosen := m.attends
	var tensors []cacheTensor
	if m.window > 0 {
		ring := cells
		if !c.SWAFull {
			ring = ringCells(m.window, cells, c, ubatch)
		}
		tensors = m.attention(c, cells, func(i int, l modelLayer) bool { return chosen(i, l) && !l.sliding })
		tensors = append(tensors, m.attention(c, ring, func(i int, l modelLayer) bool { return chosen(i, l) && l.sliding })...)
	} else {
		tensors = m.attention(c, cells, chosen)
	}
	if archHybrid.has(m.arch) {
		tensors = append(tensors, m.states(c, m.recurs)...)
	}
	return tensors
}

// ringCells are the cells of a stream in a sliding-window cache (llama_kv_cache_iswa): the windows of all sequences in it and
// one physical batch; never more than the full cache.
func ringCells(window, cells uint64, c Context, ubatch uint64) uint64 {
	if c.Unified {
		window *= c.Parallel
	}
	return pad(min(cells, window+ubatch), cellStep)
}

func (m *Model) attends(i int, layer modelLayer) bool {
	switch {
	case m.arch == "falcon-h1":
		return true
	case archNemotron.has(m.arch):
		return !layer.recurrent && layer.feedForward == 0
	case recurrentInterval[m.arch] > 0:
		return i < m.main() && !layer.recurrent
	case archHybrid.has(m.arch):
		return !layer.recurrent
	case archNextNFiltered.has(m.arch) && m.nextn > 0:
		return i < m.main()
	}
	return true
}

func (m *Model) recurs(_ int, layer modelLayer) bool {
	switch {
	case m.arch == "falcon-h1":
		return true
	case archNemotron.has(m.arch):
		return layer.recurrent && layer.feedForward == 0
	}
	return layer.recurrent
}

// attention follows llama_kv_cache: K and V of every chosen layer that has a cache of its own.
func (m *Model) attention(c Context, cells uint64, chosen func(int, modelLayer) bool) []cacheTensor {
	var widest uint64
	for _, layer := range m.layers {
		widest = max(widest, layer.v())
	}
	streams := c.Parallel
	if c.Unified {
		streams = 1
	}
	var tensors []cacheTensor
	for i, layer := range m.layers {
		if i >= m.kvFromStart || !chosen(i, layer) {
			continue
		}
		tensors = append(tensors, cacheTensor{kind: c.TypeK, row: layer.k(), cells: cells, streams: streams})
		if m.mla {
			continue
		}
		v := cacheTensor{kind: c.TypeV, row: layer.v(), cells: cells, streams: streams, spread: !c.FlashAttention}
		if v.spread { // transposed, all layers' V are as wide as the widest
			v.row = widest
		}
		tensors = append(tensors, v)
	}
	return tensors
}

// states follows llama_memory_recurrent: R and S of every chosen layer, one row a sequence.
func (m *Model) states(c Context, chosen func(int, modelLayer) bool) []cacheTensor {
	var tensors []cacheTensor
	for i, layer := range m.layers[:m.main()] {
		if chosen(i, layer) {
			for _, row := range []uint64{m.stateR, m.stateS} {
				tensors = append(tensors, cacheTensor{kind: "f32", row: row, cells: c.Parallel, streams: 1, state: true})
			}
		}
	}
	return tensors
}
