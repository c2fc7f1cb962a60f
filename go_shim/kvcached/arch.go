package kvcached

import "strings"

// What each architecture's metadata means for its caches, after load_arch_hparams of llama.cpp's src/models/*.cpp. `kvpatch
// estimate` has the same tables, and a test compares the two. An architecture that is in none of them is estimated from above.

type nameSet map[string]bool

func names(text string) nameSet {
	set := nameSet{}
	for _, name := range strings.Fields(text) {
		set[name] = true
	}
	return set
}

func (s nameSet) has(name string) bool { return s[name] }

var (
	// One cache of full attention over all layers, nothing that deviates.
	archPlain = names(`
		apertus arcee arctic baichuan bailingmoe bitnet bloom chameleon chatglm codeshell cogvlm command-r dbrx deci
		deepseek deepseek2-ocr dots1 ernie4_5 ernie4_5-moe exaone falcon gemma gpt2 gptneox granite granitemoe grok
		grovemoe hunyuan-dense hunyuan-moe hunyuan_vl internlm2 jais jais2 llama llama-embed maincoder minicpm
		minicpm3 minimax-m2 mistral3 mpt nanbeige nemotron olmo olmoe openelm orion paddleocr pangu-embedded phi2 phi3
		phimoe plamo plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm
		starcoder starcoder2 talkie xverse`)

	// No cache at all: create_memory returns nullptr.
	archCacheless = names(`
		bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert modern-bert gemma-embedding dream
		llada llada-moe rnd1`)
	// Of these and all, those whose causal_attn is false: the context does not limit their batch.
	archNotCausal = names(`gemma-embedding dream llada llada-moe rnd1`)

	archRecurrent = names(`mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7`) // llm_arch_is_recurrent
	archHybrid    = names(`
		jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h nemotron_h_moe qwen3next kimi-linear kimi-k3
		qwen35 qwen35moe minimax-01`)  // llm_arch_is_hybrid, without deepseek4
	// A layer without KV heads is recurrent.
	archRecurrentByHeads = names(`jamba plamo2 granitehybrid lfm2 lfm2moe kimi-linear kimi-k3`)
	archNemotron         = names(`nemotron_h nemotron_h_moe`) // as well, if it has no feed-forward part either
	archRWKV             = names(`rwkv6 rwkv6qwen2 rwkv7 arwkv7`)
	archKimi             = names(`kimi-linear kimi-k3`)

	// nextn_predict_layers counts layers at the end that only a drafting context uses.
	archNextN = names(`
		bailingmoe2 cohere2moe deepseek2 mistral4 deepseek32 exaone-moe exaone4 glm-dsa glm4 glm4moe hy_v3 mimo2
		nemotron_h nemotron_h_moe qwen35 qwen35moe qwen3next step35`)
	// Of these, those whose cache leaves such layers out; the others reserve cells for them all the same.
	archNextNFiltered = names(`step35 hy_v3 mimo2 glm-dsa deepseek32`)

	// Multi-head latent attention if key_length_mla and value_length_mla are set.
	archMLA = names(`deepseek2 mistral4 deepseek32 glm-dsa kimi-linear kimi-k3`)
	archDSA = names(`deepseek32 glm-dsa`) // a second cache of indexer keys
	archMSA = names(`minimax-m3`)         // likewise
)

// recurrentInterval: attention.recurrent_layers, or else every nth layer is not recurrent: full_attention_interval, or this.
var recurrentInterval = map[string]uint64{"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}

// slidingRule is how an architecture's sliding-window layers are found.
type slidingRule struct {
	period     int64  // every nth layer is full, unless the file has another number; 0: the file has a flag a layer; -1: all that are not recurrent
	window     uint64 // cells if the file does not say
	fixed      uint64 // cells whatever the file says
	needed     bool   // the file must say
	optional   bool   // without the key, or with 0, no layer slides
	array      bool   // the file may have a period or flags
	denseFirst bool   // the full layer comes first of each period
}

var slidingRules = map[string]slidingRule{
	"afmoe":        {period: 4, optional: true},
	"cohere2":      {period: 4, needed: true},
	"cohere2moe":   {period: 4, needed: true, array: true, denseFirst: true},
	"exaone-moe":   {period: 4, needed: true},
	"exaone4":      {period: 4, window: 4096}, // only with 64 layers
	"gemma2":       {period: 2, window: 4096},
	"gemma3":       {period: 6, optional: true},
	"gemma3n":      {period: 5, needed: true},
	"gemma4":       {needed: true},
	"gpt-oss":      {period: 2, needed: true},
	"laguna":       {period: 4, optional: true, denseFirst: true},
	"lfm2":         {period: -1, optional: true},
	"llama4":       {period: 4, fixed: 8192}, // chunks; none if the key is there and 0
	"mellum":       {period: 4, optional: true, array: true},
	"mimo2":        {needed: true},
	"muse-glimmer": {period: 4, needed: true, array: true},
	"olmo2":        {period: 4, optional: true},
	"plamo3":       {period: 8, optional: true},
	"smallthinker": {period: 4, fixed: 4096, optional: true, denseFirst: true},
	"step35":       {needed: true},
}

func archKnown(arch string) bool {
	for _, set := range []nameSet{archPlain, archCacheless, archRecurrent, archHybrid, archNextN, archMLA, archDSA, archMSA} {
		if set.has(arch) {
			return true
		}
	}
	_, sliding := slidingRules[arch]
	return sliding
}

// archRenamed are architectures of files that only Ollama has written: its llama-server reads them as others. Their keys begin
// with the name in the file.
var archRenamed = map[string]string{
	"deepseekocr":     "deepseek2-ocr",
	"glm4moelite":     "deepseek2",
	"glmocr":          "glm4",
	"gptoss":          "gpt-oss",
	"nemotron_h_omni": "nemotron_h_moe", // or nemotron_h: the same to a cache
	"olmo3":           "olmo2",
	"qwen25vl":        "qwen2vl",
}
