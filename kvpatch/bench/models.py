"""Q4_0 models of any size, written on the spot with random weights: what costs time and memory in a model is its shape.

Blocks come out of one seeded tile that is longer than any tensor, each tensor from another place of it, so 4 GB take
seconds. Values are scaled as in the smoke tests' tiny models, and for the same reasons: attention is sharp, so that
the context decides what comes next, and only words are ever produced. The sign of each block's scale is random: a
Q4_0 block holds -8..7, whose mean is not zero, and rows with a common mean make a model say one word for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from kvpatch import paths
from kvpatch.errors import UsageError
from kvpatch.smoke import models as tiny

_BLOCK = 32  # values of a Q4_0 block: an f16 scale and 16 bytes of two values each
_BLOCK_TYPE = np.dtype([("d", "<f2"), ("q", "u1", (16,))])
_DEVIATION = float(np.sqrt(np.mean((np.arange(16) - 8.0) ** 2)))  # of a block's values, scale 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Dimensions of a llama model with grouped-query attention; all must be multiples of 32 where Q4_0 stores them."""

    name: str
    layers: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocab: int
    trained: int = 262144


# 4.08 GB: an 8B model's layers, with a vocabulary of 32,768.
EIGHT_B = Shape(name="8b", layers=32, embd=4096, heads=32, kv_heads=8, head_dim=128, ff=14336, vocab=32768)
# As deep as it must be to show a context's influence, as small as a CPU in CI wants it.
TINY = Shape(name="tiny", layers=4, embd=256, heads=4, kv_heads=2, head_dim=64, ff=512, vocab=2048)
# For a memory checker on a GPU: heads as wide as real ones, so that the real kernels run.
SMALL = Shape(name="small", layers=2, embd=1024, heads=8, kv_heads=8, head_dim=128, ff=2048, vocab=2048)
SHAPES = {shape.name: shape for shape in (EIGHT_B, TINY, SMALL)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model file, made here or somebody's own."""

    path: Path

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


def shape_named(name: str) -> Shape:
    """Raises UsageError for a name that there is not."""
    try:
        return SHAPES[name]
    except KeyError:
        raise UsageError(f"no shape is called {name!r}", hint=f"one of {', '.join(SHAPES)}") from None


def folder(cache: Path | None = None) -> Path:
    """Where models are kept: a large one is written once."""
    return paths.cache_root(cache) / "bench" / "models"


def ensure(folder: Path, shape: Shape, seed: int = 1) -> Model:
    """The model of this shape and seed in `folder`, written now if it is not there."""
    path = folder / f"{shape.name}-{seed}-{_version()}.gguf"
    if not path.is_file():
        with paths.part_of(path) as part:
            write(part, shape, seed)
    return Model(path=path)


def write(path: Path, shape: Shape, seed: int = 1) -> None:
    """Write the model; the same bytes for the same shape and seed."""
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"kvpatch-bench-{shape.name}-{seed}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    tiny.add_dimensions(writer, shape, trained=shape.trained, rope_base=500000.0)
    _add_tokenizer(writer, shape.vocab)
    plan = list(_tensors(shape))
    for name, rows, columns, scale in plan:
        if scale is None:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), columns * 4)
        else:
            size = rows * columns // _BLOCK * _BLOCK_TYPE.itemsize
            stored = (rows, columns // _BLOCK * _BLOCK_TYPE.itemsize)
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    tile = _Tile(max(rows * columns // _BLOCK for _, rows, columns, scale in plan if scale), seed)
    words = tiny.word_ids()
    for name, rows, columns, scale in plan:
        if scale is None:
            writer.write_tensor_data(np.ones(columns, dtype=np.float32))
            continue
        blocks = tile.take(rows * columns // _BLOCK, scale / np.sqrt(columns) / _DEVIATION)
        if name == "output.weight":
            # The best of many random logits is above zero: what has a row of zeros is never produced.
            a_row = columns // _BLOCK
            blocks["d"][: words.start * a_row] = 0
            blocks["d"][words.stop * a_row :] = 0
        writer.write_tensor_data(blocks.view(np.uint8))
    writer.close()


class _Tile:
    """Random blocks, twice as many as a tensor needs at most; each tensor starts at another of them."""

    def __init__(self, blocks: int, seed: int) -> None:
        # RandomState's streams are frozen by NumPy's policy (NEP 19).
        self._random = np.random.RandomState(seed)
        self._most = blocks
        self._blocks = np.zeros(2 * blocks, dtype=_BLOCK_TYPE)
        self._blocks["q"] = np.frombuffer(self._random.bytes(2 * blocks * 16), dtype=np.uint8).reshape(-1, 16)
        self._signs = self._random.randint(0, 2, size=2 * blocks).astype(np.float16) * 2 - 1

    def take(self, count: int, scale: float) -> npt.NDArray[Any]:
        start = int(self._random.randint(0, self._most))
        taken: npt.NDArray[Any] = self._blocks[start : start + count].copy()
        taken["d"] = self._signs[start : start + count] * np.float16(scale)
        return taken


def _tensors(shape: Shape) -> Iterator[tuple[str, int, int, float | None]]:
    """Name, rows, columns and the deviation of a row's product with a normalised input; None: a norm's ones, f32."""
    q = shape.heads * shape.head_dim
    kv = shape.kv_heads * shape.head_dim
    yield "token_embd.weight", shape.vocab, shape.embd, float(np.sqrt(shape.embd))
    for i in range(shape.layers):
        block = f"blk.{i}."
        yield block + "attn_norm.weight", 1, shape.embd, None
        yield block + "attn_q.weight", q, shape.embd, 2.0
        yield block + "attn_k.weight", kv, shape.embd, 2.0
        yield block + "attn_v.weight", kv, shape.embd, 1.0
        yield block + "attn_output.weight", shape.embd, q, 4.0
        yield block + "ffn_norm.weight", 1, shape.embd, None
        yield block + "ffn_gate.weight", shape.ff, shape.embd, 2.0
        yield block + "ffn_up.weight", shape.ff, shape.embd, 2.0
        yield block + "ffn_down.weight", shape.embd, shape.ff, 1.0
    yield "output_norm.weight", 1, shape.embd, None
    yield "output.weight", shape.vocab, shape.embd, 4.0


def _add_tokenizer(writer: Any, vocab: int) -> None:
    """The smoke tests' words, then tokens that only fill the vocabulary up."""
    words = len(tiny.vocabulary()[0])
    if vocab < words:
        raise UsageError(f"a vocabulary of {vocab} has no room for the {words} tokens of every model")
    tiny.add_tokenizer(writer, vocab - words)


def _version() -> str:
    """Changes with what writes a model, so that one which an older version wrote is not taken for ours."""
    sources = (Path(__file__), Path(tiny.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:8]
