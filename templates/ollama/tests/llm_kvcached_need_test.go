package llm

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/ml"
)

// kvcachedFile is a model's file with these keys beside those that all have: 4 layers of 4 heads of 64 elements.
func kvcachedFile(t *testing.T, arch string, more map[string]any, tensors ...*ggml.Tensor) KVCachedLoad {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "model.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	kv := ggml.KV{
		"general.architecture":            arch,
		arch + ".context_length":          uint32(4096),
		arch + ".embedding_length":        uint32(256),
		arch + ".block_count":             uint32(4),
		arch + ".attention.head_count":    uint32(4),
		arch + ".attention.head_count_kv": uint32(4),
	}
	for key, value := range more {
		if value == nil {
			delete(kv, arch+"."+key)
		} else {
			kv[arch+"."+key] = value
		}
	}
	tensors = append(tensors, &ggml.Tensor{Name: "output.weight", Shape: []uint64{8, 2}, WriterTo: bytes.NewReader(make([]byte, 64))})
	if err := ggml.WriteGGUF(file, kv, tensors); err != nil {
		t.Fatal(err)
	}
	f, err := LoadModel(file.Name(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	return KVCachedLoad{ModelPath: file.Name(), GGML: f, Options: api.Options{Runner: api.Runner{NumCtx: 2048, NumGPU: -1}}}
}

// TestKVCachedNeedKV has the caches in bytes: K and V of 64 elements a head, 2 bytes each, in pages of 4 KiB.
func TestKVCachedNeedKV(t *testing.T) {
	t.Setenv("OLLAMA_FLASH_ATTENTION", "1")
	const cell = 4 * 64 * 2 // K or V of a layer with 4 heads
	plain := func(l *KVCachedLoad) {}
	for _, c := range []struct {
		name            string
		arch            string
		more            map[string]any
		change          func(*KVCachedLoad)
		first, reserved uint64
	}{
		{"plain", "llama", nil, plain, 8 * 256 * cell, 8 * 2048 * cell},
		{"two sequences, each with a stream", "llama", nil, func(l *KVCachedLoad) { l.Parallel = 2 }, 8 * 256 * cell, 8 * 2 * 2048 * cell},
		{"context rounded up", "llama", nil, func(l *KVCachedLoad) { l.Options.NumCtx = 1000 }, 8 * 256 * cell, 8 * 1024 * cell},
		{"q8_0", "llama", nil, func(l *KVCachedLoad) { l.KVCacheType = "Q8_0" }, 8 * 256 * 8 * 34, 8 * 2048 * 8 * 34},
		{"one KV head", "llama", map[string]any{"attention.head_count_kv": uint32(1)}, plain, 2 * 256 * cell, 2 * 2048 * cell},
		{"heads by layer", "llama", map[string]any{"attention.head_count_kv": []uint32{4, 2, 0, 2}}, plain, 4 * 256 * cell, 4 * 2048 * cell},
		{"window", "gemma3", map[string]any{"attention.sliding_window": uint32(512), "attention.sliding_window_pattern": uint32(2)}, plain,
			8 * 256 * cell, 4*2048*cell + 4*1024*cell},
		{"window by flags", "gemma4", map[string]any{
			"attention.sliding_window": uint32(512), "attention.sliding_window_pattern": []bool{true, true, true, false},
			"attention.key_length_swa": uint32(64), "attention.value_length_swa": uint32(64),
		}, plain, 8 * 256 * cell, 2*2048*cell + 6*1024*cell},
		{"Ollama's own name", "gptoss", map[string]any{"attention.sliding_window": uint32(512)}, plain, 8 * 256 * cell, 4*2048*cell + 4*1024*cell},
		{"latent attention", "deepseek2", map[string]any{
			"attention.head_count_kv": uint32(1), "attention.key_length": uint32(576), "attention.value_length": uint32(512),
			"attention.key_length_mla": uint32(192), "attention.value_length_mla": uint32(128),
		}, plain, 4 * 256 * 576 * 2, 4 * 2048 * 576 * 2},
		{"latent attention in Ollama's own form", "glm4moelite", map[string]any{
			"attention.kv_lora_rank": uint32(512), "rope.dimension_count": uint32(64), "attention.key_length": uint32(256),
		}, plain, 4 * 256 * 576 * 2, 4 * 2048 * 576 * 2},
		{"recurrent", "mamba", map[string]any{"ssm.conv_kernel": uint32(5), "ssm.inner_size": uint32(1024), "ssm.state_size": uint32(16)},
			plain, 4 * (4*1024 + 16*1024) * 4, 4 * (4*1024 + 16*1024) * 4},
		{"encoder", "bert", nil, plain, 0, 0},
		{"own file of an embedding model", "gemma3", map[string]any{"dense": true}, plain, 0, 0},
		{"drafting by a layer of its own", "qwen3next", map[string]any{
			"full_attention_interval": uint32(1), "nextn_predict_layers": uint32(1),
			"ssm.conv_kernel": uint32(1), "ssm.inner_size": uint32(0), "ssm.state_size": uint32(0),
		}, func(l *KVCachedLoad) { l.Options.DraftNumPredict = 4 }, (6 + 2) * 256 * cell, (6 + 2) * 2048 * cell},
	} {
		t.Run(c.name, func(t *testing.T) {
			var tensors []*ggml.Tensor
			if c.more["dense"] != nil {
				tensors = append(tensors, &ggml.Tensor{Name: "dense.0.weight", Shape: []uint64{8}, WriterTo: bytes.NewReader(make([]byte, 32))})
			}
			load := kvcachedFile(t, c.arch, c.more, tensors...)
			c.change(&load)
			need := KVCachedNeed(load)
			if need.FirstStep != c.first || need.Reserved != c.reserved || (need.Inexact != "") != (load.Options.DraftNumPredict > 0) {
				t.Errorf("%+v, want a first step of %d of %d", need, c.first, c.reserved)
			}
		})
	}
}

func TestKVCachedNeedByKind(t *testing.T) {
	t.Setenv("OLLAMA_FLASH_ATTENTION", "1")
	load := kvcachedFile(t, "llama", nil)
	info, err := os.Stat(load.ModelPath)
	if err != nil {
		t.Fatal(err)
	}
	size := uint64(info.Size())
	load.Projectors = []string{load.ModelPath, ""}
	load.Adapters = []string{load.ModelPath + ".none"}
	host := KVCachedNeed(load)
	if host.Weights != size || host.Outside != size || host.Context != 0 || host.Fixed() != size {
		t.Errorf("in host memory: %+v, the file has %d", host, size)
	}

	// 256 tokens wide, with a mask of 2048 cells for a batch of 512
	if host.Compute < 2048*512*2 || host.Compute > 10<<20 {
		t.Errorf("compute buffers: %+v", host)
	}

	load.GPUs = []ml.DeviceInfo{{DeviceID: ml.DeviceID{Library: "CUDA"}}}
	gpu := KVCachedNeed(load)
	if gpu.Weights != size || gpu.Outside != 0 || gpu.Context != kvcached.CUDAContext || gpu.Fixed() != kvcached.CUDAContext {
		t.Errorf("on a GPU: %+v", gpu)
	}
	if gpu.FirstStep != 8*(2<<20) {
		t.Errorf("on a GPU a tensor begins with a page of 2 MiB: %+v", gpu)
	}
	load.Options.NumGPU = 0
	if got := KVCachedNeed(load); got != host {
		t.Errorf("kept off the GPU: %+v, want %+v", got, host)
	}

	load.Draft = kvcachedFile(t, "llama", nil).ModelPath
	load.Options.DraftNumPredict = 4
	if got := KVCachedNeed(load); got.Weights != 2*size || got.FirstStep != 2*host.FirstStep || got.Reserved != 2*host.Reserved || got.Inexact == "" {
		t.Errorf("with a draft of the same size: %+v, alone %+v", got, host)
	}
}

func TestKVCachedNeedOfWhatHasNoRules(t *testing.T) {
	t.Setenv("OLLAMA_FLASH_ATTENTION", "1")
	need := KVCachedNeed(kvcachedFile(t, "somethingnew", nil))
	if want := KVCachedNeed(kvcachedFile(t, "llama", nil)); need.FirstStep < want.FirstStep || need.Reserved < want.Reserved {
		t.Errorf("%+v, want at least %+v", need, want)
	}
	if need.Inexact != "there are no rules for the architecture somethingnew" {
		t.Errorf("%q", need.Inexact)
	}
}
