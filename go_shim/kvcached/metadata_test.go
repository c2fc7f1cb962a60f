package kvcached

import (
	"slices"
	"strings"
	"testing"
)

func TestMetadataOfAnyType(t *testing.T) {
	values := map[string]any{
		"general.architecture": "llama",
		"llama.u8":             uint8(7), "llama.i64": int64(7), "llama.f": 7.0, "llama.yes": true, "llama.text": "seven", "llama.below": int32(-7),
		"llama.u": []uint32{1, 0, 3}, "llama.i": []int32{1, 0, 3}, "llama.b": []bool{true, false, true}, "llama.any": []any{1.0, false, uint8(3)},
		"llama.negative": []int32{1, -1, 3}, "llama.long": []bool(nil),
	}
	open := func() *fields { return openKeys(func(key string) any { return values[key] }) }

	for key, want := range map[string]uint64{"u8": 7, "i64": 7, "f": 7, "yes": 1, "none": 9} {
		if k := open(); k.get(key, 9) != want || k.err != nil {
			t.Errorf("%s: %d, %v", key, k.get(key, 9), k.err)
		}
	}
	for _, key := range []string{"text", "below", "u"} {
		if k := open(); k.get(key, 9) != 0 || k.err == nil || !strings.Contains(k.err.Error(), "llama."+key) {
			t.Errorf("%s: %v", key, k.err)
		}
	}
	if k := open(); k.need("none") != 0 || k.err == nil || k.err.Error() != "the file has no key llama.none" {
		t.Errorf("%v", k.err)
	}
	for _, key := range []string{"u", "i", "any"} {
		if k := open(); !slices.Equal(k.perLayer(key, 3, nil), []uint64{1, 0, 3}) || k.err != nil {
			t.Errorf("%s: %v, %v", key, k.perLayer(key, 3, nil), k.err)
		}
	}
	if k := open(); !slices.Equal(k.flags("b", 3), []bool{true, false, true}) || k.err != nil {
		t.Errorf("%v", k.err)
	}
	if k := open(); !slices.Equal(k.perLayer("u8", 2, nil), []uint64{7, 7}) || !slices.Equal(k.perLayer("none", 2, []uint64{4, 5}), []uint64{4, 5}) || k.err != nil {
		t.Errorf("%v", k.err)
	}
	for key, count := range map[string]int{"u": 4, "negative": 3, "long": 3} {
		if k := open(); len(k.perLayer(key, count, nil)) != count || k.err == nil {
			t.Errorf("%s: no error", key)
		}
	}
	if k := openKeys(func(string) any { return nil }); k.err == nil {
		t.Error("a file without an architecture")
	}
}

// TestDeriveRefuses has what no exact size can be told of; each of them gets an estimate from above all the same.
func TestDeriveRefuses(t *testing.T) {
	for _, test := range []struct {
		name, arch string
		change     map[string]any
		want       string
	}{
		{"no rules", "deepseek4", nil, "no rules for the architecture deepseek4"},
		{"no layers", "llama", map[string]any{"block_count": 0}, "0 layers"},
		{"too many layers", "llama", map[string]any{"block_count": 513}, "513 layers"},
		{"no length", "llama", map[string]any{"context_length": nil}, "no key llama.context_length"},
		{"heads of other layers", "llama", map[string]any{"attention.head_count_kv": []uint32{1}}, "1 entries for 4 layers"},
		{"all for drafting", "glm4", map[string]any{"nextn_predict_layers": 4}, "4 of its 4 layers"},
		{"loops", "nanbeige", map[string]any{"num_loops": 2}, "num_loops"},
		{"window without layers", "gemma3", map[string]any{"attention.sliding_window": 512, "attention.sliding_window_pattern": 1}, "no layer that uses it"},
		{"no flags", "gemma4", map[string]any{"attention.sliding_window": 512, "attention.key_length_swa": 64, "attention.value_length_swa": 64}, "sliding_window_pattern"},
		{"interval of 0", "qwen3next", map[string]any{"full_attention_interval": 0}, "full_attention_interval is 0"},
	} {
		values := map[string]any{
			"general.architecture": test.arch, test.arch + ".block_count": 4, test.arch + ".context_length": 4096,
			test.arch + ".embedding_length": 256, test.arch + ".attention.head_count": 4,
		}
		for key, value := range test.change {
			values[test.arch+"."+key] = value
		}
		metadata := func(key string) any { return values[key] }
		if _, err := Derive(metadata); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.name, err)
		}
		context := Context{Cells: 1024, Parallel: 1, FlashAttention: true, Batch: 512, Ubatch: 512}
		need := Shape{Metadata: metadata, Context: context, Device: HostMemory}.Need()
		if !strings.Contains(need.Inexact, test.want) {
			t.Errorf("%s: %+v", test.name, need)
		}
		if layers := values[test.arch+".block_count"].(int); layers > 0 && need.Reserved < 2*uint64(min(layers, maxLayers))*1024*64*2 { // one head at least
			t.Errorf("%s: %d reserved", test.name, need.Reserved)
		}
	}
}

func TestPlanRefuses(t *testing.T) {
	model := func(arch string) *Model {
		return &Model{arch: arch, layers: []modelLayer{{kvHeads: 2, headK: 72, headV: 64}}, trained: 4096, kvFromStart: 1, causal: true}
	}
	good := Context{Cells: 1024, Parallel: 2, FlashAttention: true, Batch: 512}
	for _, test := range []struct {
		name   string
		change func(*Context, *Model)
		want   string
	}{
		{"nothing wrong", func(*Context, *Model) {}, ""},
		{"type", func(c *Context, _ *Model) { c.TypeK = "q2_0" }, `"q2_0" is no type`},
		{"block and head", func(c *Context, _ *Model) { c.TypeK = "q8_0" }, "do not divide a head's 72"},
		{"V without flash attention", func(c *Context, _ *Model) { c.TypeV, c.FlashAttention = "q8_0", false }, "needs flash attention"},
		{"row of K", func(c *Context, m *Model) { c.TypeK, c.FlashAttention, m.layers[0].kvHeads = "q8_0", false, 1 }, "a row of 72 elements"},
		{"flash attention that is forced off", func(c *Context, m *Model) { c.TypeV, m.arch = "q8_0", "grok" }, "needs flash attention"},
		{"two types", func(c *Context, m *Model) { c.TypeV, m.mla = "f32", true }, "of one type"},
		{"no batch", func(c *Context, _ *Model) { c.Batch = 0 }, "batch of 0"},
		{"no sequence", func(c *Context, _ *Model) { c.Parallel = 0 }, "0 sequences"},
		{"too many sequences", func(c *Context, _ *Model) { c.Parallel = 257 }, "257 sequences"},
		{"no context", func(c *Context, m *Model) { c.Cells, m.trained = 0, 0 }, "no context length"},
	} {
		c, m := good, model("llama")
		test.change(&c, m)
		_, err := m.Plan(c)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}
