package kvcached

import (
	"math"
	"slices"
)

// HostPage is the page size that libkvcached uses for ordinary memory unless it is told another.
const HostPage = 4096

// Shape is a model's file with all that decides what the model occupies.
type Shape struct {
	Metadata  Metadata
	Vocab     uint64 // tokens; 0 where they are not known
	Embedding bool   // it embeds texts: every token of a batch has a result
	Weights   uint64 // bytes of all its files
	Outside   uint64 // of these, held outside the library
	Context   Context
	Device    DeviceKind
	Own       uint64 // what a process itself takes on the device: CUDAContext on a GPU

	Drafts      uint64   // tokens drafted at once; 0 for none
	Draft       Metadata // the file of a drafting model; nil: the model's own layers for drafting
	DraftVocab  uint64   // of that model
	DraftLayers uint64   // how many layers for drafting the model has
}

// Need sums, over the tensors of all caches, whole pages: under the first cells of one sequence for the first step (attention
// reads 256 cells at least; recurrent states are there from the start), under everything for what is reserved.
func (s Shape) Need() Need {
	model, caches, reason := s.caches()
	need := Need{
		Weights:   s.Weights,
		Outside:   s.Outside,
		FirstStep: caches.Mapped(s.Device, 1),
		Reserved:  caches.Reserved(s.Device),
		Context:   s.Own,
		Compute:   s.compute(model, caches),
		Inexact:   reason,
	}
	if s.Drafts > 0 {
		draft, compute := s.drafting()
		need.FirstStep += draft.Mapped(s.Device, 1)
		need.Reserved += draft.Reserved(s.Device)
		need.Compute += compute
		if need.Inexact == "" {
			need.Inexact = "the caches of drafting are an upper estimate"
		}
	}
	return need
}

// caches are exact, or estimated from above for the reason given; there is no model then.
func (s Shape) caches() (*Model, *Caches, string) {
	model, err := Derive(s.Metadata)
	if err == nil {
		var caches *Caches
		if caches, err = model.Plan(s.Context); err == nil {
			return model, caches, ""
		}
	}
	return nil, upperCaches(s.Metadata, s.Context, allLayers), err.Error()
}

const allLayers = math.MaxUint64

// upperCaches is what a model can take at most whose layers cannot be told: each with full attention of the largest heads, and
// with a recurrent state where the file has the sizes of one.
func upperCaches(metadata Metadata, c Context, layers uint64) *Caches {
	k := openKeys(metadata)
	largest := func(key string) (n uint64) {
		if list, ok := numbers(k.raw(key)); ok && len(list) > 0 {
			return uint64(max(slices.Max(list), 0))
		}
		return k.get(key, 0)
	}
	layers = min(layers, largest("block_count")+largest("decoder_block_count"), maxLayers)
	embd, heads := largest("embedding_length"), largest("attention.head_count")
	kvHeads := largest("attention.head_count_kv")
	if kvHeads == 0 {
		kvHeads = heads
	}
	size := embd / max(heads, 1)
	headK := max(size, largest("attention.key_length"), largest("attention.key_length_swa"))
	headV := max(size, largest("attention.value_length"), largest("attention.value_length_swa"))
	if heads == 0 {
		kvHeads = 0
	}

	parallel := max(c.Parallel, 1)
	cells := c.Cells
	if cells == 0 {
		cells = largest("context_length")
	}
	caches := &Caches{Cells: pad(cells, cellStep), Ubatch: min(cells, max(c.Ubatch, 1))}
	caches.Sequence = caches.Cells
	streams := uint64(1)
	if !c.Unified {
		caches.Sequence, streams = pad((caches.Cells+parallel-1)/parallel, cellStep), parallel
		caches.Cells = caches.Sequence * parallel
	}
	indexer := largest("attention.indexer.key_length")
	inner, state := largest("ssm.inner_size"), largest("ssm.state_size")
	stateR := max(largest("ssm.conv_kernel")*(inner+2*largest("ssm.group_count")*state), 2*embd)
	stateS := max(inner*state, embd*largest("wkv.head_size"))
	for range layers {
		caches.tensors = append(caches.tensors,
			cacheTensor{kind: c.TypeK, row: kvHeads * headK, cells: caches.Sequence, streams: streams},
			cacheTensor{kind: c.TypeV, row: kvHeads * headV, cells: caches.Sequence, streams: streams, spread: !c.FlashAttention})
		if indexer > 0 {
			caches.tensors = append(caches.tensors,
				cacheTensor{kind: c.TypeK, row: max(indexer, headK), cells: caches.Sequence, streams: streams},
				cacheTensor{kind: c.TypeV, row: headV, cells: caches.Sequence, streams: streams, spread: !c.FlashAttention})
		}
		if stateS > 0 {
			caches.tensors = append(caches.tensors,
				cacheTensor{kind: "f32", row: stateR, cells: parallel, streams: 1, state: true},
				cacheTensor{kind: "f32", row: stateS, cells: parallel, streams: 1, state: true})
		}
	}
	return caches
}

// drafting is the cache of the second context that drafts, and its compute buffers: of a model of its own, or of the layers at the
// end of this one, each as wide as the widest. llama-server gives it as many cells, of f16.
func (s Shape) drafting() (*Caches, uint64) {
	draft := s
	draft.Context.TypeK, draft.Context.TypeV = "f16", "f16"
	if s.Draft != nil {
		draft.Metadata, draft.Vocab = s.Draft, s.DraftVocab
		model, caches, _ := draft.caches()
		return caches, draft.compute(model, caches)
	}
	model, caches, _ := draft.caches()
	return upperCaches(s.Metadata, draft.Context, s.DraftLayers), draft.compute(model, caches)
}
