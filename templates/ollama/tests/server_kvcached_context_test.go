package server

import (
	"slices"
	"testing"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/llm"
)

// A num_ctx within what is reserved needs no reload; one beyond it, or another option, does.
func TestKVCachedReservedContext(t *testing.T) {
	for _, c := range []struct {
		reserved int   // the setting
		asked    []int // one request after the other
		loads    []int // contexts that the model was loaded with
	}{
		{0, []int{4096, 2048, 4096, 512, 6000, 4096}, []int{4096, 6000}},
		{6000, []int{2048, 6000, 4096}, []int{6000}},
		{6000, []int{2048, 7000, 2048}, []int{6000, 7000}},
		{1 << 20, []int{2048, 8192, 100000}, []int{8192}}, // no more than the model was trained with
	} {
		b := newBench(t, 9, func(s *kvcached.Settings) { s.MaxCtx = c.reserved })
		var loads []int
		b.change = func(c *child) { loads = append(loads, c.opts.NumCtx) }
		path := kvcachedModel(t)
		for _, n := range c.asked {
			if err := b.ask("a", path, numCtx(n)); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(loads, c.loads) {
			t.Errorf("reserved %d, asked %v: loaded with %v, want %v", c.reserved, c.asked, loads, c.loads)
		}
		if err := b.ask("a", path, func(o *api.Options, _ **api.Duration) { o.NumCtx, o.NumThread = 512, 3 }); err != nil || len(loads) != len(c.loads)+1 {
			t.Errorf("another option: %v, loaded with %v", err, loads)
		}
	}
}

// A model that can shift in the request's context, and cannot in the one that is reserved, is loaded with the request's.
func TestKVCachedWindowedContext(t *testing.T) {
	b := newBench(t, 9, func(s *kvcached.Settings) { s.MaxCtx = 6000 })
	var loads []int
	b.change = func(c *child) {
		loads = append(loads, c.opts.NumCtx)
		c.within = func(n int) bool { return n > 1024 || n == c.opts.NumCtx }
	}
	path := kvcachedModelOf(t, "gemma2")
	for _, n := range []int{2048, 4096, 512, 512, 2048, 1024, 1025} {
		if err := b.ask("a", path, numCtx(n), func(o *api.Options, _ **api.Duration) { o.NumBatch = 512 }); err != nil {
			t.Fatal(err)
		}
	}
	if want := []int{6000, 512, 6000, 1024, 6000}; !slices.Equal(loads, want) {
		t.Errorf("loaded with %v, want %v", loads, want)
	}
}

// The batch of an embedding model follows its context, where nobody chose it; a smaller one needs no reload.
func TestKVCachedEmbeddingBatch(t *testing.T) {
	b := newBench(t, 9)
	b.ownBatch = true
	loads := 0
	b.change = func(*child) { loads++ }
	path := kvcachedModel(t)
	batch := func(numCtx, numBatch int) with {
		return func(o *api.Options, _ **api.Duration) { o.NumCtx, o.NumBatch = numCtx, numBatch }
	}
	for i, c := range []struct {
		change with
		loads  int
	}{
		{batch(1024, llm.DefaultEmbeddingNumBatchForContext(1024)), 1},
		{batch(512, llm.DefaultEmbeddingNumBatchForContext(512)), 1},
		{batch(512, 64), 2},
		{batch(512, 64), 2},
	} {
		if err := b.ask("a", path, c.change); err != nil || loads != c.loads {
			t.Errorf("request %d: %v, %d loads", i, err, loads)
		}
	}
}
