package kvcached

import (
	"fmt"
	"slices"
)

const maxLayers = 512

// modelLayer is one layer. Head sizes are in elements; kvHeads is 0 where it has no attention; indexer: it has indexer keys.
type modelLayer struct {
	kvHeads, headK, headV, feedForward uint64
	sliding, recurrent, indexer        bool
}

func (l modelLayer) k() uint64 { return l.headK * l.kvHeads } // n_embd_k_gqa
func (l modelLayer) v() uint64 { return l.headV * l.kvHeads } // n_embd_v_gqa

// Model is all that decides a model's caches, as llama.cpp derives it from metadata (load_hparams, load_arch_hparams).
type Model struct {
	arch           string
	layers         []modelLayer
	trained        uint64 // context
	nextn          int    // layers at the end that only drafting uses
	window         uint64 // cells that a sliding-window layer looks back on; 0 without such layers
	kvFromStart    int    // only so many first layers have a cache
	mla            bool
	stateR, stateS uint64 // elements that a recurrent layer keeps for one sequence
	indexerSize    uint64
	causal         bool
}

func (m *Model) main() int { return len(m.layers) - m.nextn }

// Derive reads a model's layers. An error says why they cannot be told exactly.
func Derive(metadata Metadata) (*Model, error) {
	k := openKeys(metadata)
	m := &Model{arch: k.arch}
	if k.err == nil && !archKnown(m.arch) {
		k.fail("there are no rules for the architecture %s", m.arch)
	}
	if k.err == nil && m.arch == "nanbeige" && k.get("num_loops", 1) > 1 {
		k.fail("it runs its layers more than once (num_loops)")
	}
	blocks := k.need("block_count")
	if k.err == nil && (blocks == 0 || blocks > maxLayers) {
		k.fail("the file says it has %d layers", blocks)
	}
	if k.err != nil {
		return nil, k.err
	}

	count := int(blocks)
	none := make([]uint64, count)
	embd := k.need("embedding_length")
	feedForward := k.perLayer("feed_forward_length", count, none)
	heads := k.perLayer("attention.head_count", count, none)
	kvHeads := k.perLayer("attention.head_count_kv", count, heads)
	if archNextN.has(m.arch) {
		nextn := k.get("nextn_predict_layers", 0)
		if nextn >= blocks {
			return nil, fmt.Errorf("the file says that %d of its %d layers are for drafting", nextn, blocks)
		}
		m.nextn = int(nextn)
	}
	headK, headV, slidingK, slidingV := headSizes(k, embd, heads[0])
	recurrent := k.recurrent(count, m.nextn, kvHeads, feedForward)
	window, sliding := k.sliding(count, m.nextn, recurrent)
	indexer := k.indexer(count, m.nextn)

	m.layers = make([]modelLayer, count)
	for i := range m.layers {
		m.layers[i] = modelLayer{
			kvHeads: kvHeads[i], headK: headK, headV: headV, feedForward: feedForward[i],
			sliding: sliding[i], recurrent: recurrent[i], indexer: indexer[i],
		}
		if sliding[i] {
			m.layers[i].headK, m.layers[i].headV = slidingK, slidingV
		}
	}
	m.window = window
	m.trained = k.need("context_length")
	m.kvFromStart = count
	switch m.arch {
	case "gemma3n":
		m.kvFromStart = 20
	case "gemma4":
		m.kvFromStart = count - int(min(k.get("attention.shared_kv_layers", 0), blocks))
	}
	m.mla = archMLA.has(m.arch) && k.get("attention.key_length_mla", 0) > 0 && k.get("attention.value_length_mla", 0) > 0
	m.stateR, m.stateS = k.states(embd, heads[0], headK)
	if archDSA.has(m.arch) || archMSA.has(m.arch) {
		m.indexerSize = k.need("attention.indexer.key_length")
	}
	m.causal = k.get("attention.causal", 1) != 0 && !archNotCausal.has(m.arch)
	if k.err != nil {
		return nil, k.err
	}
	return m, nil
}

// withIndexer is the model as the cache of indexer keys sees it: one key head of the indexer's size.
func (m *Model) withIndexer() *Model {
	other := *m
	other.layers = slices.Clone(m.layers)
	for i := range other.layers {
		layer := &other.layers[i]
		layer.kvHeads = 1
		if !layer.sliding {
			layer.headK = m.indexerSize
		}
	}
	return &other
}

func headSizes(k *fields, embd, heads uint64) (headK, headV, slidingK, slidingV uint64) {
	if heads > 0 {
		headK, headV = embd/heads, embd/heads
	}
	// The keys are read here only if the first layer has heads, and by plamo2 in any case.
	if heads > 0 || k.arch == "plamo2" {
		headK = k.get("attention.key_length", headK)
		headV = k.get("attention.value_length", headV)
	}
	slidingK = k.get("attention.key_length_swa", headK)
	slidingV = k.get("attention.value_length_swa", headV)
	switch k.arch {
	case "gemma4":
		slidingK, slidingV = k.need("attention.key_length_swa"), k.need("attention.value_length_swa")
	case "kimi-k3":
		headV = k.need("attention.kv_lora_rank")
	}
	return headK, headV, slidingK, slidingV
}

func (k *fields) recurrent(count, nextn int, kvHeads, feedForward []uint64) []bool {
	flags := make([]bool, count)
	main := count - nextn
	interval := recurrentInterval[k.arch]
	if interval > 0 && k.has("attention.recurrent_layers") {
		return k.flags("attention.recurrent_layers", count)
	}
	if interval > 0 {
		if interval = k.get("full_attention_interval", interval); interval == 0 {
			k.fail("the file's %s.full_attention_interval is 0", k.prefix)
			return flags
		}
	}
	for i := range flags {
		switch {
		case archRecurrent.has(k.arch), k.arch == "falcon-h1":
			flags[i] = true
		case archRecurrentByHeads.has(k.arch):
			flags[i] = i < main && kvHeads[i] == 0
		case archNemotron.has(k.arch):
			flags[i] = i < main && kvHeads[i] == 0 && feedForward[i] == 0
		case interval > 0:
			flags[i] = i < main && uint64(i+1)%interval != 0
		}
	}
	return flags
}

// sliding is the window in cells, 0 without one, and which layers have it.
func (k *fields) sliding(count, nextn int, recurrent []bool) (uint64, []bool) {
	const key, patternKey = "attention.sliding_window", "attention.sliding_window_pattern"
	flags := make([]bool, count)
	rule, ok := slidingRules[k.arch]
	main := count - nextn
	if !ok {
		return 0, flags
	}
	said := k.get(key, 0)
	switch {
	case k.arch == "exaone4" && main != 64, rule.optional && said == 0, k.arch == "llama4" && k.has(key) && said == 0:
		return 0, flags
	}
	window := rule.window
	switch {
	case rule.fixed > 0:
		window = rule.fixed
	case rule.needed:
		window = k.need(key)
	case said > 0:
		window = said
	}
	if rule.period < 0 {
		for i := range flags {
			flags[i] = !recurrent[i]
		}
		return window, flags
	}
	pattern := k.raw(patternKey)
	if rule.period == 0 || rule.array && (pattern == nil || isList(pattern)) {
		if pattern == nil {
			k.fail("the file has no key %s.%s", k.prefix, patternKey)
			return 0, flags
		}
		// step35, mimo2 and gemma4 read it before they know of layers for drafting.
		expected := count
		if k.arch == "cohere2moe" {
			expected = main
		}
		copy(flags, k.flags(patternKey, expected))
	} else {
		period := uint64(rule.period)
		if pattern != nil && !isList(pattern) { // an array where a number is expected is ignored, as llama.cpp does
			period = k.number(pattern, patternKey)
		}
		end := main
		if k.arch == "exaone-moe" { // which sets it before it knows of layers for drafting
			end = count
		}
		for i := range end {
			flags[i] = slides(uint64(i), period, rule.denseFirst)
		}
	}
	if !slices.Contains(flags, true) {
		k.fail("the file has a sliding window and no layer that uses it: llama.cpp stops on that")
	}
	return window, flags
}

// slides follows llama_hparams::set_swa_pattern.
func slides(layer, period uint64, denseFirst bool) bool {
	switch {
	case period == 0:
		return true
	case denseFirst:
		return layer%period != 0
	}
	return layer%period < period-1
}

func (k *fields) indexer(count, nextn int) []bool {
	flags := make([]bool, count)
	main := count - nextn
	switch {
	case k.arch == "glm-dsa" && k.has("attention.indexer.types"):
		copy(flags, k.flags("attention.indexer.types", main))
		return flags
	case archMSA.has(k.arch):
		lead := k.get("leading_dense_block_count", 0)
		for i := range flags {
			flags[i] = uint64(i) >= lead
		}
	case k.arch == "glm-dsa" && k.need("context_length") >= 1<<20:
		// llama.cpp's default of this architecture's later releases: the first two, then every fourth, of 78 layers
		for i := range min(main, 78) {
			flags[i] = i < 2 || i%4 == 2
		}
	case archDSA.has(k.arch):
		for i := range main {
			flags[i] = true
		}
	}
	return flags
}

// states are n_embd_r and n_embd_s, in llama.cpp's order of cases.
func (k *fields) states(embd, heads, headK uint64) (r, s uint64) {
	before := func(conv, otherwise uint64) uint64 {
		if conv > 0 {
			return conv - 1
		}
		return otherwise
	}
	switch {
	case !archRecurrent.has(k.arch) && !archHybrid.has(k.arch):
		return 0, 0
	case archRWKV.has(k.arch):
		size := k.need("wkv.head_size")
		return k.get("token_shift_count", 2) * embd, embd * size
	case k.arch == "lfm2", k.arch == "lfm2moe":
		return embd * before(k.need("shortconv.l_cache"), 0), 0
	case archKimi.has(k.arch):
		size, conv := k.need("kda.head_dim"), k.need("ssm.conv_kernel")
		return 3 * before(conv, 3) * heads * size, size * size * heads
	case k.arch == "minimax-01":
		return 0, headK * headK * heads
	}
	conv, inner, state := k.need("ssm.conv_kernel"), k.need("ssm.inner_size"), k.need("ssm.state_size")
	var groups uint64
	if k.arch != "mamba" && k.arch != "jamba" {
		groups = k.get("ssm.group_count", 0)
	}
	return before(conv, 0) * (inner + 2*groups*state), state * inner
}
