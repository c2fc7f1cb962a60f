package kvcached

import "testing"

// TestComputeIsEnough holds the estimate against what llama-server reports ("CPU compute buffer size", MiB) of models that differ
// in one thing each. Not above the double either, beside the margin: a lease is not to hold what nobody uses.
func TestComputeIsEnough(t *testing.T) {
	model := func(arch string, embd, heads, kvHeads, head, feed uint64, more map[string]any) Shape {
		values := map[string]any{
			"general.architecture": arch, arch + ".block_count": 4, arch + ".context_length": 32768,
			arch + ".embedding_length": embd, arch + ".feed_forward_length": feed, arch + ".attention.head_count": heads,
			arch + ".attention.head_count_kv": kvHeads, arch + ".attention.key_length": head, arch + ".attention.value_length": head,
		}
		for key, value := range more {
			values[arch+"."+key] = value
		}
		return Shape{Metadata: func(key string) any { return values[key] }, Vocab: 1024, Device: HostMemory}
	}
	gemma270 := model("gemma3", 640, 4, 1, 256, 2048, map[string]any{"attention.sliding_window": 512, "block_count": 18})
	gemma270.Vocab = 262144
	contexts := []Context{
		{Cells: 4096, Parallel: 1, FlashAttention: true, Batch: 512, Ubatch: 512},
		{Cells: 32768, Parallel: 1, FlashAttention: true, Batch: 512, Ubatch: 512},
		{Cells: 8192, Parallel: 4, FlashAttention: true, Batch: 512, Ubatch: 512},
		{Cells: 4096, Parallel: 1, Batch: 512, Ubatch: 512},
		{Cells: 4096, Parallel: 1, FlashAttention: true, Batch: 2048, Ubatch: 2048},
	}
	for _, test := range []struct {
		name  string
		shape Shape
		said  [5]float64
	}{
		{"small", model("llama", 128, 4, 2, 32, 256, nil), [5]float64{6.26, 34.26, 4.26, 41.51, 25.05}},
		{"window", model("gemma2", 128, 4, 2, 32, 256, map[string]any{"attention.sliding_window": 128}),
			[5]float64{7.02, 35.02, 5.02, 43.26, 34.08}},
		{"larger", model("llama", 512, 8, 4, 64, 2048, nil), [5]float64{20.01, 48.01, 18.01, 78.01, 80.05}},
		{"wide feed-forward", model("llama", 256, 4, 2, 64, 4096, nil), [5]float64{30.01, 58.01, 28.01, 43.01, 120.05}},
		{"many heads", model("llama", 256, 16, 2, 64, 256, nil), [5]float64{9.51, 37.51, 7.51, 142.51, 38.05}},
		{"gemma3 270M", gemma270, [5]float64{22.77, 50.77, 20.77, 51.76, 97.08}},
	} {
		for i, c := range contexts {
			test.shape.Context = c
			got := test.shape.Need().Compute
			if said := uint64(test.said[i] * (1 << 20)); got < said || got > 2*said+(2<<20) {
				t.Errorf("%s, %+v: %d, llama-server says %d", test.name, c, got, said)
			}
		}
	}
}

func TestComputeOfWhatIsNotKnown(t *testing.T) {
	context := Context{Cells: 4096, Parallel: 1, FlashAttention: true, Batch: 512, Ubatch: 512}
	for _, arch := range []string{"mamba", "jamba", "nobody"} {
		values := map[string]any{
			"general.architecture": arch, arch + ".block_count": 2, arch + ".context_length": 4096, arch + ".embedding_length": 256,
			arch + ".attention.head_count": 2, arch + ".ssm.conv_kernel": 4, arch + ".ssm.inner_size": 512, arch + ".ssm.state_size": 16,
		}
		need := Shape{Metadata: func(key string) any { return values[key] }, Device: HostMemory, Context: context}.Need()
		if need.Compute != 0 || need.FirstStep == 0 {
			t.Errorf("%s: %+v", arch, need)
		}
	}
}
