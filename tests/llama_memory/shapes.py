"""Metadata of tiny models of every architecture, as GGUF files without tensors, which libllama makes up itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

_MLA = ("deepseek2", "deepseek32", "glm-dsa", "kimi-linear", "kimi-k3", "mistral4")
_MIXED = (
    "plamo2",
    "jamba",
    "nemotron_h",
    "nemotron_h_moe",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "kimi-linear",
    "kimi-k3",
)
_FLAGS = ("cohere2moe", "mimo2", "step35", "muse-glimmer", "mellum", "gemma4")
_LAYERS = {"gemma3n": 22, "exaone4-64": 64}


class Array(tuple[int, ...]):
    """A value that is written as an array of unsigned integers."""


def keys(arch: str, *, experts: bool, layers: int | None = None, **more: Any) -> dict[str, Any]:
    """All keys that any architecture reads, with values that suit `arch`; `more` (attention__key_length=...) overrides,
    None takes a key out. A key that begins with a slash gets no prefix."""
    count = layers or _LAYERS.get(arch, 6)
    embd, heads = (128, 1) if arch in _MLA else (64, 1) if arch == "gemma3n" else (256, 2)
    mixed = [0 if arch in _MIXED and i % 3 == 1 else heads for i in range(count)]
    if arch in ("nemotron_h", "nemotron_h_moe"):
        mixed = [0 if i % 3 else heads for i in range(count)]
    every = embd // heads
    values: dict[str, Any] = {
        "vocab_size": 10240 if arch == "chameleon" else 128,
        "/tokenizer.ggml.token_type_count": 2,
        "context_length": 4096,
        "embedding_length": embd,
        "features_length": embd,
        "block_count": count,
        "leading_dense_block_count": 1,
        "feed_forward_length": 384,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "time_mix_extra_dim": 64,
        "time_decay_extra_dim": 128,
        "full_attention_interval": 2,
        "attention.head_count": Array(mixed) if arch in _MIXED else heads,
        "attention.head_count_kv": Array(mixed) if arch in _MIXED else heads,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8,
        "attention.q_lora_rank": 512,
        "attention.kv_lora_rank": 512,
        "attention.relative_buckets_count": 8,
        "attention.decay_lora_rank": 64,
        "attention.iclr_lora_rank": 64,
        "attention.value_residual_mix_lora_rank": 64,
        "attention.gate_lora_rank": 64,
        "attention.sliding_window": 100,
        "attention.sliding_window_pattern": _pattern(arch, count),
        "attention.indexer.head_count": heads if arch == "minimax-m3" else 1,
        "attention.indexer.key_length": 64,
        "attention.indexer.top_k": 8,
        "attention.indexer.block_size": 4,
        "attention.indexer.local_blocks": 1,
        "rope.dimension_sections": Array((every // 4,) * 4),
        "/xielu.alpha_n": 1.0,
        "/xielu.alpha_p": 1.0,
        "/xielu.beta": 1.0,
        "/xielu.eps": 1e-7,
        "ssm.inner_size": 256 if arch in ("qwen3next", "qwen35", "qwen35moe") else 2 * embd,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.time_step_rank": heads,
        "ssm.group_count": 0 if arch == "plamo2" else 2,
        "kda.head_dim": 128,
        "kda.gate_lower_bound": -5.0,
        "wkv.head_size": every,
        "token_shift_count": 1 if arch in ("arwkv7", "rwkv6qwen2") else 2,
        "shortconv.l_cache": 3,
        "residual_scale": 3.5,
        "attn_res.block_size": 12,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
        "embedding_length_per_layer_input": embd // 2,
        "attention.shared_kv_layers": 2 if arch == "gemma4" else 0,
        "attention.key_length_swa": every,
        "attention.value_length_swa": every,
    }
    if arch in ("nemotron_h", "nemotron_h_moe"):
        values["feed_forward_length"] = Array(384 if i % 3 == 2 else 0 for i in range(count))
    if arch in _MLA:
        values |= {
            "attention.key_length": 576,
            "attention.value_length": 512,
            "rope.dimension_count": 64,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        }
        del values["attention.key_length_swa"], values["attention.value_length_swa"]
    if arch == "plm":
        values |= {"attention.key_length": 192, "attention.value_length": 128, "rope.dimension_count": 64}
    if arch == "minimax-m3":
        values["rope.dimension_count"] = 64
    if experts:
        values |= {
            "expert_feed_forward_length": 384,
            "expert_shared_feed_forward_length": 384,
            "expert_latent_length": 384,
            "interleave_moe_layer_step": 2,
            "expert_count": 2,
            "expert_used_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_group_scale": 1.0,
            "experts_per_group": 1,
        }
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in values.items() if value is not None}


def _pattern(arch: str, count: int) -> int | Array:
    # a layer that shares a cache uses the last or the last but one before it, which must be a full and a sliding one
    if arch == "gemma4":
        return Array(int(i % 2 == 0) for i in range(count))
    if arch in _FLAGS:
        return Array(int(i % 3 != 2) for i in range(count))
    return 5 if arch == "gemma3n" else 3


def write(path: Path, arch: str, values: dict[str, Any]) -> Path:
    """A GGUF file with these keys and no tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model("no_vocab")
    for key, value in values.items():
        name = key.removeprefix("/") if key.startswith("/") else f"{arch}.{key}"
        if isinstance(value, Array):
            writer.add_array(name, list(value))
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
