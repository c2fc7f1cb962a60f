"""The layers of a model as llama.cpp derives them from metadata (llama_model_base::load_hparams, load_arch_hparams)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvpatch.estimate import archs
from kvpatch.estimate.errors import EstimateError, UnknownArchitectureError
from kvpatch.estimate.reader import GgufModel

MAX_LAYERS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer. Head sizes in elements; `kv_heads` 0 where it has no attention; `indexer`: has indexer keys."""

    index: int
    kv_heads: int
    head_k: int
    head_v: int
    feed_forward: int
    sliding: bool = False
    recurrent: bool = False
    indexer: bool = False

    @property
    def k_elements(self) -> int:
        """Elements of a cell's row in K (n_embd_k_gqa)."""
        return self.head_k * self.kv_heads

    @property
    def v_elements(self) -> int:
        """Elements of a cell's row in V (n_embd_v_gqa)."""
        return self.head_v * self.kv_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """All that decides the caches. `nextn`: layers at the end that only drafting uses. `window`: cells a sliding-window
    layer looks back on, 0 if the model has none. `kv_from_start`: only so many first layers have a cache (-1: all).
    `state_r`, `state_s`: elements a recurrent layer keeps for one sequence (n_embd_r, n_embd_s)."""

    arch: str
    layers: tuple[Layer, ...]
    context_trained: int
    nextn: int
    window: int
    kv_from_start: int
    mla: bool
    state_r: int
    state_s: int
    indexer_size: int
    causal: bool

    @property
    def n_layer(self) -> int:
        """Layers of the model proper (llama_hparams::n_layer)."""
        return len(self.layers) - self.nextn


def derive(gguf: GgufModel) -> Model:
    """The layers of a file; UnknownArchitectureError if that cannot be done exactly."""
    arch = gguf.arch
    if arch in archs.UNKNOWN:
        raise UnknownArchitectureError(arch, archs.UNKNOWN[arch])
    if arch not in archs.KNOWN:
        raise UnknownArchitectureError(arch, "kvpatch has no rules for it")
    count = int(gguf.need("block_count"))
    if not 0 < count <= MAX_LAYERS:
        raise EstimateError(f"{gguf.paths[0]} says it has {count} layers; llama.cpp takes 1 to {MAX_LAYERS}")
    if arch == "nanbeige" and gguf.get("num_loops", 1) > 1:
        raise UnknownArchitectureError(arch, "it runs its layers more than once (num_loops)")
    embd = int(gguf.need("embedding_length"))
    feed_forward = _per_layer(gguf, "feed_forward_length", count, 0)
    heads = _per_layer(gguf, "attention.head_count", count, 0)
    kv_heads = _per_layer(gguf, "attention.head_count_kv", count, heads)
    nextn = int(gguf.get("nextn_predict_layers", 0)) if arch in archs.NEXTN else 0
    if nextn >= count:
        raise EstimateError(f"{gguf.paths[0]} says that {nextn} of its {count} layers are for drafting")
    sizes = _head_sizes(gguf, embd, heads[0])
    recurrent = _recurrent(gguf, count, nextn, kv_heads, feed_forward)
    window, sliding = _sliding(gguf, count, nextn, recurrent)
    indexer = _indexer(gguf, count, nextn)
    layers = tuple(
        Layer(
            index=i,
            kv_heads=kv_heads[i],
            head_k=sizes["k_swa"] if sliding[i] else sizes["k"],
            head_v=sizes["v_swa"] if sliding[i] else sizes["v"],
            feed_forward=feed_forward[i],
            sliding=sliding[i],
            recurrent=recurrent[i],
            indexer=indexer[i],
        )
        for i in range(count)
    )
    state_r, state_s = _states(gguf, embd, heads[0], sizes["k"])
    return Model(
        arch=arch,
        layers=layers,
        context_trained=int(gguf.need("context_length")),
        nextn=nextn,
        window=window,
        kv_from_start=_kv_from_start(gguf, count),
        mla=_mla(gguf),
        state_r=state_r,
        state_s=state_s,
        indexer_size=int(gguf.need("attention.indexer.key_length")) if arch in archs.DSA | archs.MSA else 0,
        causal=bool(gguf.get("attention.causal", True)) and arch not in archs.NOT_CAUSAL,
    )


def with_indexer(model: Model) -> Model:
    """The model as the cache of indexer keys sees it: one key head of the indexer's size (llama_kv_cache_dsa, _msa)."""
    layers = tuple(
        replace(layer, kv_heads=1, head_k=layer.head_k if layer.sliding else model.indexer_size)
        for layer in model.layers
    )
    return replace(model, layers=layers)


def _per_layer(gguf: GgufModel, key: str, count: int, default: int | Sequence[int]) -> tuple[int, ...]:
    """A number for all layers or one a layer (get_key_or_arr)."""
    value: Any = gguf.get(key)
    if value is None:
        return (default,) * count if isinstance(default, int) else tuple(default)
    if not isinstance(value, tuple):
        return (int(value),) * count
    if len(value) != count:
        raise EstimateError(
            f"{gguf.arch}.{key} of {gguf.paths[0]} has {len(value)} entries for {count} layers"
        )
    return tuple(int(v) for v in value)


def _head_sizes(gguf: GgufModel, embd: int, heads: int) -> dict[str, int]:
    k = v = embd // heads if heads > 0 else 0
    # The keys are read here only if the first layer has heads, and by plamo2 in any case.
    if heads > 0 or gguf.arch == "plamo2":
        k = int(gguf.get("attention.key_length", k))
        v = int(gguf.get("attention.value_length", v))
    k_swa = int(gguf.get("attention.key_length_swa", k))
    v_swa = int(gguf.get("attention.value_length_swa", v))
    if gguf.arch == "gemma4":
        k_swa, v_swa = (
            int(gguf.need("attention.key_length_swa")),
            int(gguf.need("attention.value_length_swa")),
        )
    if gguf.arch == "kimi-k3":
        v = int(gguf.need("attention.kv_lora_rank"))
    return {"k": k, "v": v, "k_swa": k_swa, "v_swa": v_swa}


def _recurrent(
    gguf: GgufModel, count: int, nextn: int, kv_heads: Sequence[int], feed_forward: Sequence[int]
) -> list[bool]:
    arch, main = gguf.arch, count - nextn
    if arch in archs.RECURRENT or arch == "falcon-h1":
        return [True] * count
    if arch in archs.RECURRENT_BY_HEADS:
        return [i < main and kv_heads[i] == 0 for i in range(count)]
    if arch in ("nemotron_h", "nemotron_h_moe"):
        return [i < main and kv_heads[i] == 0 and feed_forward[i] == 0 for i in range(count)]
    if arch in archs.RECURRENT_BY_INTERVAL:
        flags = gguf.get("attention.recurrent_layers")
        if flags is not None:
            return [bool(f) for f in _per_layer(gguf, "attention.recurrent_layers", count, 0)]
        interval = int(gguf.get("full_attention_interval", archs.RECURRENT_BY_INTERVAL[arch]))
        return [i < main and (i + 1) % interval != 0 for i in range(count)]
    return [False] * count


def _sliding(gguf: GgufModel, count: int, nextn: int, recurrent: Sequence[bool]) -> tuple[int, list[bool]]:
    """Window in cells, 0 without, and a flag a layer."""
    none = 0, [False] * count
    rule = archs.SLIDING.get(gguf.arch)
    if rule is None:
        return none
    main = count - nextn
    said = gguf.get("attention.sliding_window")
    if gguf.arch == "exaone4" and main != 64:
        return none
    if (rule.optional and not said) or (gguf.arch == "llama4" and said == 0):
        return none
    window = int(
        rule.fixed or (gguf.need("attention.sliding_window") if rule.needed else said or rule.window)
    )
    if rule.period < 0:
        return window, [not r for r in recurrent]
    pattern = gguf.get("attention.sliding_window_pattern")
    if rule.period == 0 or (rule.array and (isinstance(pattern, tuple) or pattern is None)):
        if pattern is None:
            gguf.need("attention.sliding_window_pattern")
        # step35, mimo2 and gemma4 read it before they know of layers for drafting.
        expected = main if gguf.arch == "cohere2moe" else count
        flags = [bool(f) for f in _per_layer(gguf, "attention.sliding_window_pattern", expected, 0)]
        flags += [False] * (count - expected)
    else:
        # A pattern that is an array where a number is expected is ignored, as llama.cpp does.
        period = rule.period if pattern is None or isinstance(pattern, tuple) else int(pattern)
        end = (
            count if gguf.arch == "exaone-moe" else main
        )  # which sets it before it knows of layers for drafting
        flags = [i < end and _slides(i, period, rule.dense_first) for i in range(count)]
    if not any(flags):
        raise EstimateError(
            f"{gguf.paths[0]} has a sliding window and no layer that uses it: llama.cpp stops on that"
        )
    return window, flags


def _slides(layer: int, period: int, dense_first: bool) -> bool:
    """llama_hparams::set_swa_pattern."""
    if period == 0:
        return True
    return layer % period != 0 if dense_first else layer % period < period - 1


def _indexer(gguf: GgufModel, count: int, nextn: int) -> list[bool]:
    arch, main = gguf.arch, count - nextn
    if arch == "deepseek32":
        return [i < main for i in range(count)]
    if arch in archs.MSA:
        lead = int(gguf.get("leading_dense_block_count", 0))
        return [i >= lead for i in range(count)]
    if arch != "glm-dsa":
        return [False] * count
    types = gguf.get("attention.indexer.types")
    if types is not None:
        return [bool(f) for f in _per_layer(gguf, "attention.indexer.types", main, 0)] + [False] * nextn
    if int(gguf.need("context_length")) < 1048576:
        return [i < main for i in range(count)]
    # llama.cpp's default of this architecture's later releases: the first two, then every fourth, of 78 layers
    return [i < min(main, 78) and (i < 2 or i % 4 == 2) for i in range(count)]


def _kv_from_start(gguf: GgufModel, count: int) -> int:
    if gguf.arch == "gemma3n":
        return 20
    if gguf.arch == "gemma4":
        return count - int(gguf.get("attention.shared_kv_layers", 0))
    return -1


def _mla(gguf: GgufModel) -> bool:
    if gguf.arch not in archs.MLA:
        return False
    return bool(gguf.get("attention.key_length_mla", 0)) and bool(gguf.get("attention.value_length_mla", 0))


def _states(gguf: GgufModel, embd: int, heads: int, head_k: int) -> tuple[int, int]:
    """n_embd_r and n_embd_s, in llama.cpp's order of cases."""
    arch = gguf.arch
    if arch not in archs.RECURRENT | archs.HYBRID:
        return 0, 0
    if arch in archs.RWKV:
        size = int(gguf.need("wkv.head_size"))
        return int(gguf.get("token_shift_count", 2)) * embd, embd * size
    if arch in ("lfm2", "lfm2moe"):
        return embd * (int(gguf.need("shortconv.l_cache")) - 1), 0
    if arch in ("kimi-linear", "kimi-k3"):
        size, conv = int(gguf.need("kda.head_dim")), int(gguf.need("ssm.conv_kernel"))
        return 3 * (conv - 1 if conv > 0 else 3) * heads * size, size * size * heads
    if arch == "minimax-01":
        return 0, head_k * head_k * heads
    conv, inner, state = (int(gguf.need(f"ssm.{k}")) for k in ("conv_kernel", "inner_size", "state_size"))
    groups = int(gguf.get("ssm.group_count", 0)) if arch not in ("mamba", "jamba") else 0
    return (conv - 1 if conv > 0 else 0) * (inner + 2 * groups * state), state * inner
