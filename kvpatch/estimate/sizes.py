"""Sizes of types, rows and buffers; sizes as people write them."""

from __future__ import annotations

import re

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from kvpatch.estimate.errors import EstimateError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# What llama-server's --cache-type-k and --cache-type-v take (common/arg.cpp, kv_cache_types).
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_PLAIN = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": KIB,
    "mi": MIB,
    "gi": GIB,
    "ti": 1 << 40,
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)


def pad(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple (GGML_PAD)."""
    return -(-value // multiple) * multiple


def type_of(name: str) -> GGMLQuantizationType:
    """The type of that name, in either case."""
    try:
        return GGMLQuantizationType[name.upper()]
    except KeyError:
        raise EstimateError(f"{name!r} is no type of a tensor") from None


def kv_type(name: str) -> GGMLQuantizationType:
    """The type of a KV cache, one that llama-server takes."""
    if name.lower() not in KV_TYPES:
        raise EstimateError(f"{name!r} is no type of a KV cache", hint=f"one of {', '.join(KV_TYPES)}")
    return type_of(name)


def is_quantised(kind: GGMLQuantizationType) -> bool:
    """ggml_is_quantized."""
    return kind.name not in _PLAIN


def block_size(kind: GGMLQuantizationType) -> int:
    """Elements that one block holds (ggml_blck_size)."""
    return int(GGML_QUANT_SIZES[kind][0])


def row_bytes(kind: GGMLQuantizationType, elements: int) -> int:
    """ggml_row_size. A row that is no whole number of blocks is an EstimateError: ggml stops on it."""
    block, size = GGML_QUANT_SIZES[kind]
    if elements % block:
        raise EstimateError(
            f"a row of {elements} elements cannot be {kind.name.lower()}, whose blocks hold {block}",
            hint="another --kv-type" if kind.name.lower() in KV_TYPES else None,
        )
    return int(elements // block * size)


def parse_bytes(text: str, what: str = "size") -> int:
    """Bytes of "20GB" (10^9), "2MiB" (2^20), "4096"; a UsageError names `what`."""
    found = _SIZE.match(text)
    if not found:
        raise EstimateError(
            f"{what} {text!r} is no size", hint="a number and a unit, as in 20GB, 19.5GiB, 2MiB or 4096"
        )
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()] + 0.5)


def format_bytes(count: int) -> str:
    """For people: two decimals of the largest binary unit."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
