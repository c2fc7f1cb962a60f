"""What each architecture's metadata means for its caches, after `load_arch_hparams` of llama.cpp's src/models/*.cpp.

An architecture is here only if all that decides its caches has been read there; any other one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# One cache of full attention over all layers, nothing that deviates.
PLAIN = _names(
    """
    apertus arcee arctic baichuan bailingmoe bitnet bloom chameleon chatglm codeshell cogvlm command-r dbrx deci
    deepseek deepseek2-ocr dots1 ernie4_5 ernie4_5-moe exaone falcon gemma gpt2 gptneox granite granitemoe grok
    grovemoe hunyuan-dense hunyuan-moe hunyuan_vl internlm2 jais jais2 llama llama-embed maincoder minicpm
    minicpm3 minimax-m2 mistral3 mpt nemotron olmo olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe
    plamo plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm
    starcoder starcoder2 talkie xverse
    """
)

# No cache at all: create_memory returns nullptr.
CACHELESS = _names(
    """
    bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert modern-bert gemma-embedding dream
    llada llada-moe rnd1
    """
)
# llama_hparams.causal_attn is false there: the batch is not limited by the context.
NOT_CAUSAL = frozenset({"gemma-embedding", "dream", "llada", "llada-moe", "rnd1"})
# No output matrix: encoders, and one that multiplies by the embeddings where they are.
NO_OUTPUT = (CACHELESS - NOT_CAUSAL) | {"bitnet"}

RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})  # llm_arch_is_recurrent
HYBRID = _names(
    # llm_arch_is_hybrid, without deepseek4
    """
    jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h nemotron_h_moe qwen3next kimi-linear kimi-k3
    qwen35 qwen35moe minimax-01
    """
)
# A layer whose n_head_kv is 0 is recurrent.
RECURRENT_BY_HEADS = frozenset(
    {"jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear", "kimi-k3"}
)
# attention.recurrent_layers, or else every nth layer is not recurrent: attention.full_attention_interval, default.
RECURRENT_BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}
RWKV = frozenset({"rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})

# nextn_predict_layers counts layers at the end that only a drafting context uses; their weights are skipped.
NEXTN = _names(
    """
    bailingmoe2 cohere2moe deepseek2 mistral4 deepseek32 exaone-moe exaone4 glm-dsa glm4 glm4moe hy_v3 mimo2
    nemotron_h nemotron_h_moe qwen35 qwen35moe qwen3next step35
    """
)
# Of such layers, what is loaded all the same: llama.cpp creates these tensors without the flag that skips them.
DRAFTING_LOADED = {
    **dict.fromkeys(("deepseek2", "mistral4", "qwen35moe", "qwen3next"), _names("ffn_gate_up_exps")),
    **dict.fromkeys(("deepseek32", "glm-dsa"), _names("exp_probs_b")),
    "cohere2moe": _names("ffn_gate_up_exps nextn.embed_tokens nextn.shared_head_head nextn.shared_head_norm"),
    "hy_v3": _names(
        """
        ffn_gate ffn_down ffn_up ffn_gate_inp exp_probs_b ffn_gate_exps ffn_down_exps ffn_up_exps ffn_gate_up_exps
        ffn_gate_shexp ffn_up_shexp ffn_down_shexp nextn.embed_tokens nextn.shared_head_head nextn.shared_head_norm
        """
    ),
    "step35": _names(
        """
        attn_q_norm attn_k_norm attn_gate ffn_gate ffn_down ffn_up ffn_gate_inp ffn_gate_exps ffn_down_exps ffn_up_exps
        exp_probs_b ffn_gate_shexp ffn_up_shexp ffn_down_shexp nextn.embed_tokens nextn.shared_head_head
        nextn.shared_head_norm
        """
    ),
}
# Of NEXTN, those whose cache leaves these layers out; the others reserve cells for them all the same.
NEXTN_FILTERED = frozenset({"step35", "hy_v3", "mimo2", "glm-dsa", "deepseek32"})
# Multi-head latent attention if key_length_mla and value_length_mla are set.
MLA = frozenset({"deepseek2", "mistral4", "deepseek32", "glm-dsa", "kimi-linear", "kimi-k3"})
# A second cache of indexer keys.
DSA = frozenset({"deepseek32", "glm-dsa"})
MSA = frozenset({"minimax-m3"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sliding:
    """How an architecture's sliding-window layers are found. `window`: cells if the file does not say; `fixed`: cells
    whatever the file says; `needed`: the file must say. `optional`: without the key (or 0) no layer slides.
    `period`: every nth layer is full, unless the file has another number; 0: the file has an array of a flag a layer.
    `array`: the file may have either. `dense_first`: the full layer comes first of each n."""

    period: int
    window: int = 0
    fixed: int = 0
    needed: bool = False
    optional: bool = False
    array: bool = False
    dense_first: bool = False


SLIDING = {
    "afmoe": Sliding(period=4, optional=True),
    "cohere2": Sliding(period=4, needed=True),
    "cohere2moe": Sliding(period=4, needed=True, array=True, dense_first=True),
    "exaone-moe": Sliding(period=4, needed=True),
    "exaone4": Sliding(period=4, window=4096),  # only with 64 layers: see layers.py
    "gemma2": Sliding(period=2, window=4096),
    "gemma3": Sliding(period=6, optional=True),
    "gemma3n": Sliding(period=5, needed=True),
    "gemma4": Sliding(period=0, needed=True),
    "gpt-oss": Sliding(period=2, needed=True),
    "laguna": Sliding(period=4, optional=True, dense_first=True),
    "lfm2": Sliding(period=-1, optional=True),  # every layer that is not recurrent
    "llama4": Sliding(period=4, fixed=8192),  # chunks; none if the key is there and 0
    "mellum": Sliding(period=4, optional=True, array=True),
    "mimo2": Sliding(period=0, needed=True),
    "muse-glimmer": Sliding(period=4, needed=True, array=True),
    "olmo2": Sliding(period=4, optional=True),
    "plamo3": Sliding(period=8, optional=True),
    "smallthinker": Sliding(period=4, fixed=4096, optional=True, dense_first=True),
    "step35": Sliding(period=0, needed=True),
}

KNOWN = (
    PLAIN
    | CACHELESS
    | RECURRENT
    | HYBRID
    | NEXTN
    | MLA
    | DSA
    | MSA
    | frozenset(SLIDING)
    | frozenset({"nanbeige"})
)

# Why not, for those that llama.cpp knows and this does not.
UNKNOWN = {
    "deepseek4": "its compressed caches follow rules of their own",
    "dflash": "a drafting model, whose cache depends on its target",
    "eagle3": "a drafting model, whose cache depends on its target",
    "gemma4-assistant": "a drafting model that uses its target's cache",
    "graniteswitch": "it adds a layer that routes adapters",
    "pockettts": "a speech model of several parts",
    "qwen3tts": "a speech model of several parts",
    "t5": "an encoder and a decoder with separate layers",
    "t5encoder": "an encoder of an encoder-decoder model",
    "wavtokenizer-dec": "a decoder of sound",
}

# Where a file has no output matrix, others use the token embeddings; with these llama.cpp does not load it.
NEVER_TIED = _names(
    """
    apertus arwkv7 baichuan bailingmoe bailingmoe2 codeshell dbrx dots1 gptneox internlm2 jais kimi-k3
    kimi-linear llada-moe mellum mimo2 minimax-m2 minimax-m3 muse-glimmer nemotron olmo2 olmoe gpt-oss orion
    phi2 phimoe plamo qwen qwen2moe rwkv6 rwkv6qwen2 rwkv7 stablelm step35 talkie xverse
    """
)
