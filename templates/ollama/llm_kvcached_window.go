package llm

import (
	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
)

// A model with sliding windows can shift its context only where that is short (kvcached.Shape.Shifts). A request for so short a
// context would be answered beyond it, and ends at it in the longer context that is reserved: for such a request, and as long
// as it is the last one, the model is loaded with its num_ctx alone, as by upstream.

// kvcachedWindowed says whether a model is to be loaded with opts.NumCtx rather than with more. shift: it is started with
// context shift.
func kvcachedWindowed(f *ggml.GGML, opts api.Options, parallel, reserve int, shift bool) bool {
	if !shift || opts.NumCtx >= reserve {
		return false
	}
	if _, embedding := f.KV()[f.KV().Architecture()+".pooling_type"]; embedding {
		return false // nothing is predicted
	}
	if len(f.Tensors().Items("v.")) > 0 {
		return false // llama-server does not shift with a projector, which is in this file
	}
	return kvcachedShifts(f, opts, parallel) && !kvcachedShifts(f, kvcachedSized(opts, reserve), parallel)
}

func kvcachedSized(opts api.Options, numCtx int) api.Options {
	opts.NumCtx = numCtx
	return opts
}

func kvcachedShifts(f *ggml.GGML, opts api.Options, parallel int) bool {
	parallel = max(parallel, 1)
	batch, ubatch := uint64(2048), uint64(512) // llama-server's own
	if opts.NumBatch > 0 {
		batch, ubatch = uint64(opts.NumBatch), uint64(opts.NumBatch)
	}
	return kvcached.Shape{Metadata: kvcachedMetadata(f), Context: kvcached.Context{
		Cells: uint64(max(opts.NumCtx, 0) * parallel), Parallel: uint64(parallel), FlashAttention: true, Batch: batch, Ubatch: ubatch,
	}}.Shifts()
}

// KVCachedWithin says whether a request with this num_ctx, no larger than the runner's, is answered as if the model had been
// loaded with it.
func (s *llamaServerRunner) KVCachedWithin(numCtx int) bool {
	shift := s.launch.config.ContextShift && len(s.launch.projectors) == 0
	return !kvcachedWindowed(s.ggml, kvcachedSized(s.options, numCtx), s.launch.numParallel, s.options.NumCtx, shift)
}
