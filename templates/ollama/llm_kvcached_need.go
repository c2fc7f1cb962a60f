package llm

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/ml"
)

// KVCachedLoad is a model with what decides its size once it is loaded.
type KVCachedLoad struct {
	ModelPath   string
	GGML        *ggml.GGML // of ModelPath
	Adapters    []string
	Projectors  []string
	Draft       string // "" for none
	KVCacheType string // "" is f16
	Options     api.Options
	Parallel    int // sequences; 0 is 1
	GPUs        []ml.DeviceInfo
}

// KVCachedNeed predicts what a model occupies on the device that its layers are on: the first GPU that it may use, else host
// memory. Its files are each counted once (a projector may be inside the model's own).
func KVCachedNeed(l KVCachedLoad) kvcached.Need {
	shape := kvcached.Shape{KVType: strings.ToLower(l.KVCacheType), Page: kvcachedPage()}

	counted := map[string]bool{"": true}
	for _, paths := range [][]string{{l.ModelPath, l.Draft}, l.Adapters, l.Projectors} {
		for _, path := range paths {
			if counted[path] {
				continue
			}
			counted[path] = true
			if info, err := os.Stat(path); err == nil {
				shape.Weights += uint64(info.Size())
			}
		}
	}

	// Models that attend in both directions embed a text in one batch and keep no cache.
	if kv := l.GGML.KV(); kv.Bool("attention.causal", true) {
		for _, heads := range kv.HeadCountKV() {
			shape.Layers = append(shape.Layers, kvcached.Layer{
				K: heads * kv.EmbeddingHeadCountK(),
				V: heads * kv.EmbeddingHeadCountV(),
			})
		}
	}
	need := shape.Need()
	if len(l.GPUs) > 0 && l.Options.NumGPU != 0 {
		need.Context, need.Outside = kvcached.CUDAContext, 0
	} else {
		need.Outside = kvcachedOutside(l.Options, kvcached.ThisCPU(), l.GGML, need.Weights)
	}
	return need
}

// kvcachedPage is the page size that the child is told by the same variable, 0 for the library's own. A value that is
// not a number is the child's to refuse.
func kvcachedPage() uint64 {
	page, err := strconv.ParseUint(os.Getenv("KVCACHED_PAGE_SIZE"), 10, 64)
	if err != nil {
		return 0
	}
	return page
}

// kvcachedOutside is the part of a model's weights that its child does not map through the library: all of them where the
// file is memory-mapped; else those that the CPU's backend keeps in a layout of its own. A prediction for a model on the
// CPU; for one on a GPU, whose weights are claimed on that device, it does not matter.
func kvcachedOutside(opts api.Options, cpu kvcached.CPU, f *ggml.GGML, weights uint64) uint64 {
	if opts.UseMMap == nil || *opts.UseMMap {
		return weights
	}
	tensors := f.Tensors().Items()
	tied := !slices.ContainsFunc(tensors, func(t *ggml.Tensor) bool { return t.Name == "output.weight" })
	var outside uint64
	for _, t := range tensors {
		switch {
		case len(t.Shape) != 2 && len(t.Shape) != 3:
		case t.Name == "token_embd.weight" && !tied:
			// only looked up; without an output matrix a copy of it is that
		case cpu.Repacks(t.Type(), t.Shape[0], t.Shape[1], len(t.Shape) == 3):
			outside += t.Size()
		}
	}
	return outside
}

// kvcachedNeed is the need of a runner as it is about to be started.
func (s *llamaServerRunner) kvcachedNeed() kvcached.Need {
	l := s.launch
	return KVCachedNeed(KVCachedLoad{
		ModelPath: l.modelPath, GGML: s.ggml, Adapters: l.adapters, Projectors: l.projectors, Draft: l.config.DraftModelPath,
		KVCacheType: l.kvCacheType, Options: l.opts, Parallel: l.numParallel, GPUs: l.gpus,
	})
}
