package llm

import (
	"encoding/json"
	"log/slog"
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

// KVCachedNeed predicts what a model occupies on the device that its layers are on: the GPUs that it may use, else host memory.
// Its files are each counted once (a projector may be inside the model's own). Options.NumCtx is the context of one sequence as
// the child is told it.
func KVCachedNeed(l KVCachedLoad) kvcached.Need {
	_, embedding := l.GGML.KV()[l.GGML.KV().Architecture()+".pooling_type"]
	parallel := max(l.Parallel, 1)
	shape := kvcached.Shape{
		Metadata:  kvcachedMetadata(l.GGML),
		Vocab:     kvcachedVocab(l.GGML),
		Embedding: embedding,
		Context: kvcached.Context{
			Cells:          uint64(max(l.Options.NumCtx, 0) * parallel),
			Parallel:       uint64(parallel),
			TypeK:          strings.ToLower(l.KVCacheType),
			TypeV:          strings.ToLower(l.KVCacheType),
			FlashAttention: LlamaServerFlashAttention(l.GPUs) != ml.FlashAttentionDisabled,
			Batch:          2048, // llama-server's own
			Ubatch:         512,
		},
		Device: kvcached.HostMemory,
	}
	batch := l.Options.NumBatch
	if embedding {
		batch = embeddingBatchSize(l.Options, parallel)
	}
	if batch > 0 {
		shape.Context.Batch, shape.Context.Ubatch = uint64(batch), uint64(batch)
	}

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
	if len(l.GPUs) > 0 && l.Options.NumGPU != 0 {
		shape.Device, shape.Own = kvcached.CUDAMemory, kvcached.CUDAContext
	} else {
		shape.Outside = kvcachedOutside(l.Options, kvcached.ThisCPU(), l.GGML, shape.Weights)
	}
	if page := kvcachedPage(); page > 0 {
		shape.Device.Page = page
	}
	kvcachedDrafts(&shape, l)
	return shape.Need()
}

// kvcachedDrafts adds the second context of a model that drafts, by another file or by layers of its own.
func kvcachedDrafts(shape *kvcached.Shape, l KVCachedLoad) {
	if l.Options.DraftNumPredict <= 0 {
		return
	}
	switch {
	case l.Draft != "":
		f, err := LoadModel(l.Draft, 1024)
		if err != nil {
			return // the load reports it
		}
		shape.Draft, shape.DraftVocab = kvcachedMetadata(f), kvcachedVocab(f)
	case hasMTPDraft(l.GGML):
		shape.DraftLayers = max(uint64(l.GGML.KV().Uint("nextn_predict_layers")), 1)
	default:
		return
	}
	shape.Drafts = uint64(l.Options.DraftNumPredict)
}

// kvcachedVocab is the number of tokens by the matrices that have a row for each.
func kvcachedVocab(f *ggml.GGML) (tokens uint64) {
	for _, t := range f.Tensors().Items() {
		if len(t.Shape) == 2 && (t.Name == "output.weight" || t.Name == "token_embd.weight") {
			tokens = max(tokens, t.Shape[1])
		}
	}
	return tokens
}

// kvcachedMetadata reads a file's keys. Arrays, whose type is hidden, are told by what they are written as; those that are long
// have not been read, and hold nothing. Ollama's own files of one embedding model pass for a chat model's but for a tensor.
func kvcachedMetadata(f *ggml.GGML) kvcached.Metadata {
	kv := f.KV()
	renamed := kv.Architecture() == "gemma3" &&
		slices.ContainsFunc(f.Tensors().Items(), func(t *ggml.Tensor) bool { return t.Name == "dense.0.weight" })
	return func(key string) any {
		if renamed {
			if key == "general.architecture" {
				return "gemma-embedding"
			}
			if rest, ok := strings.CutPrefix(key, "gemma-embedding."); ok {
				key = "gemma3." + rest
			}
		}
		list, ok := kv[key].(json.Marshaler)
		if !ok {
			return kv[key]
		}
		text, err := list.MarshalJSON()
		if err != nil {
			return nil
		}
		var flags []bool
		if json.Unmarshal(text, &flags) == nil {
			return flags
		}
		var numbers []float64
		if json.Unmarshal(text, &numbers) == nil {
			return numbers
		}
		var bytes []byte
		if json.Unmarshal(text, &bytes) == nil {
			return bytes
		}
		return nil
	}
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

// kvcachedNeed is the need of a runner as it is about to be started. What is not exact in it is said in the log.
func (s *llamaServerRunner) kvcachedNeed() kvcached.Need {
	l := s.launch
	need := KVCachedNeed(KVCachedLoad{
		ModelPath: l.modelPath, GGML: s.ggml, Adapters: l.adapters, Projectors: l.projectors, Draft: l.config.DraftModelPath,
		KVCacheType: l.kvCacheType, Options: l.opts, Parallel: l.numParallel, GPUs: l.gpus,
	})
	if need.Inexact != "" {
		slog.Info("kvcached: the KV cache is estimated from above", "model", l.modelPath, "architecture", s.ggml.KV().Architecture(),
			"why", need.Inexact, "first_kv_step", kvcached.FormatSize(need.FirstStep), "reserved", kvcached.FormatSize(need.Reserved))
	}
	return need
}
