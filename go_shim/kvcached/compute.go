package kvcached

// compute is an estimate of a context's compute buffers that is meant to be enough, 0 where only llama.cpp can know (recurrent
// layers, and models without rules). llama.cpp reserves its graph for one physical batch with every cell in use, and ggml's
// allocator gives each tensor's place to later ones, so that what counts is the widest place in the graph:
//
//	masks     batch * cells * 2 bytes (4 without flash attention), of the full and of the sliding-window cache; there throughout
//	feeding   batch * 4 * (3 * feed-forward + 5 * embedding); of experts, that of all that are used together and their results
//	attending batch * 4 * (3 * Q + K + V + 5 * embedding), and 4 * batch * cells * heads of scores without flash attention
//	output    4 * (vocabulary * results + 2 * batch * embedding)
//
// The factors are the least that hold for what llama.cpp reports of models of several shapes (August 2026), and 1/16 and 1 MiB
// are put on top. Releases that reserve a result for every token of a batch take more: the child's own claim then decides.
func (s Shape) compute(m *Model, caches *Caches) uint64 {
	if m == nil || archRecurrent.has(m.arch) || archHybrid.has(m.arch) {
		return 0
	}
	k := openKeys(s.Metadata)
	largest := func(key string) (n uint64) {
		for _, one := range k.perLayer(key, len(m.layers), []uint64{0}) {
			n = max(n, one)
		}
		return n
	}
	embd, feed, heads := k.get("embedding_length", 0), largest("feed_forward_length"), largest("attention.head_count")
	used := k.get("expert_used_count", 0)
	feeding := 3*max(feed, used*largest("expert_feed_forward_length")+largest("expert_shared_feed_forward_length")) + (5+2*used)*embd
	var attending, cells, ring uint64
	for _, layer := range m.layers {
		attending = max(attending, 3*heads*max(layer.headK, layer.headV)+layer.k()+layer.v()+5*embd)
	}

	batch := caches.Ubatch
	cells = caches.Sequence
	if m.window > 0 {
		ring = ringCells(m.window, caches.Sequence, s.Context, batch)
	}
	if archCacheless.has(m.arch) { // texts are attended to within their batch
		cells, ring = batch, 0
	}
	scores, mask := uint64(0), uint64(2)
	if !s.Context.FlashAttention || m.arch == "grok" {
		scores, mask = 4*batch*cells*heads, 4
	}
	masks := batch * (cells + ring) * mask
	perLayer := 2 * batch * 4 * k.get("embedding_length_per_layer_input", 0) * uint64(len(m.layers))

	results := min(batch, max(s.Context.Parallel, 1)*(1+s.Drafts))
	if s.Embedding {
		results = 0 // no matrix of words is multiplied by
	}
	output := 4 * (s.Vocab*results + 2*batch*embd)
	if k.err != nil {
		return 0
	}
	sum := masks + perLayer + max(batch*4*feeding, batch*4*attending+scores, output)
	return pad(sum+sum/16+1<<20, s.Device.Page)
}
