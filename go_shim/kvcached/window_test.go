package kvcached

import "testing"

// The sizes that llama-server (of September 2026) says "context shift is not supported" to, and those it does not.
func TestShifts(t *testing.T) {
	keys := map[string]any{
		"general.architecture": "gemma2", "gemma2.context_length": uint32(8192), "gemma2.block_count": uint32(2),
		"gemma2.embedding_length": uint32(256), "gemma2.feed_forward_length": uint32(512), "gemma2.attention.head_count": uint32(4),
		"gemma2.attention.head_count_kv": uint32(2), "gemma2.attention.sliding_window": uint32(512),
	}
	for _, c := range []struct {
		arch            string
		cells, parallel uint64
		batch           uint64
		want            bool
	}{
		{"gemma2", 256, 1, 512, true},
		{"gemma2", 1024, 1, 512, true},
		{"gemma2", 1025, 1, 512, false}, // one more step of cells
		{"gemma2", 8192, 1, 512, false},
		{"gemma2", 1024, 1, 128, false},
		{"gemma2", 768, 1, 128, true},  // 640 is padded
		{"gemma2", 2048, 2, 512, true}, // of both sequences together
		{"gemma2", 4096, 2, 512, false},
		{"unheard-of", 1024, 1, 512, true},
		{"unheard-of", 2048, 1, 512, false},
		{"llama", 8192, 1, 512, true},
	} {
		metadata := func(key string) any {
			if key == "general.architecture" {
				return c.arch
			}
			if c.arch == "llama" && key == "llama.attention.sliding_window" {
				return nil
			}
			if len(key) > len(c.arch) && key[:len(c.arch)] == c.arch {
				return keys["gemma2"+key[len(c.arch):]]
			}
			return keys[key]
		}
		shape := Shape{Metadata: metadata, Context: Context{
			Cells: c.cells, Parallel: c.parallel, FlashAttention: true, Batch: c.batch, Ubatch: c.batch,
		}}
		if got := shape.Shifts(); got != c.want {
			t.Errorf("%s, %d cells of %d, batch %d: %v", c.arch, c.cells, c.parallel, c.batch, got)
		}
	}
}
