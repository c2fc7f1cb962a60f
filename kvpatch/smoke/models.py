"""Tiny models for smoke tests: real GGUF files with random weights, a few MB each, the same bytes every time.

They are shaped so that faults show. Rows of the key-value cache are wide enough that 256 cells (the step in
which llama.cpp reads its cache) span whole 4 KiB pages; the next token depends on all of the context, so that
one wrong cell changes the answer; only words are ever produced (byte and control tokens have an output row of
zeros, and the best of many random logits is always above zero), so answers are readable text that never ends
early.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"
_SPACE = "\u0120"  # how byte-level BPE writes a space inside a token
BOS, EOS, END, USER, ASSISTANT, SYSTEM = (
    "<|bos|>",
    "<|eos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
_CONTROL = (BOS, EOS, END, USER, ASSISTANT, SYSTEM)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT_TRAINED = 32768
_CACHE_ELEMENT_BYTES = 2  # f16, llama.cpp's default cache type


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Dimensions of a tiny model. `window` > 0 makes every other layer a sliding-window layer of that many
    cells."""

    arch: str
    layers: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    window: int = 0
    pooling: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one cell in the K tensor (and as many in V) of one layer, f16."""
        return self.kv_heads * self.head_dim * _CACHE_ELEMENT_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel:
    """A written model file; `sha256` is of the file."""

    path: Path
    seed: int
    shape: Shape
    sha256: str

    def cache_bytes(self, cells: int) -> int:
        """Bytes that K and V of all layers take for `cells` cells of a full-attention cache, padding
        aside."""
        return 2 * self.shape.layers * self.shape.row_bytes * cells


LLAMA = Shape(arch="llama", layers=4, embd=128, heads=4, kv_heads=2, head_dim=32, ff=256)
LLAMA_POOLED = Shape(arch="llama", layers=2, embd=128, heads=4, kv_heads=2, head_dim=32, ff=256, pooling=True)
SLIDING = Shape(arch="gemma2", layers=4, embd=128, heads=4, kv_heads=2, head_dim=32, ff=256, window=128)


def tiny_llama(path: Path, seed: int) -> TinyModel:
    """Write a llama model (grouped-query attention, full context in every layer)."""
    return write(path, seed, LLAMA)


def tiny_swa(path: Path, seed: int) -> TinyModel:
    """Write a gemma2 model, in which sliding-window and full-attention layers alternate."""
    return write(path, seed, SLIDING)


def tiny_embedding(path: Path, seed: int) -> TinyModel:
    """Write a llama model whose file asks for mean pooling, which is what makes servers treat it as an
    embedder."""
    return write(path, seed, LLAMA_POOLED)


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: 256 bytes, 105 syllables, the same after a space, control
    tokens."""
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    tokens = [*_byte_symbols(), *syllables, *(_SPACE + s for s in syllables), *_CONTROL]
    merges = [f"{s[0]} {s[1]}" for s in syllables] + [f"{_SPACE} {s}" for s in syllables]
    return tokens, merges


def word_ids() -> range:
    """Ids of the tokens a model can produce (syllables, bare and after a space)."""
    return range(256, 256 + 2 * len(_CONSONANTS) * len(_VOWELS))


def prompt_ids(count: int, salt: int = 0) -> list[int]:
    """`count` word ids that look random and are the same every time; another `salt`, another prompt."""
    rng = np.random.RandomState(7919 + salt)
    ids = word_ids()
    return [int(i) for i in rng.randint(ids.start, ids.stop, size=count)]


def prompt_text(count: int, salt: int = 0) -> str:
    """As `prompt_ids`, as text of `count` words, each of which the tokenizer makes one token."""
    tokens, _ = vocabulary()
    return " ".join(tokens[i].lstrip(_SPACE) for i in prompt_ids(count, salt))


def _byte_symbols() -> list[str]:
    """The printable stand-in of each byte value, as GPT-2's byte-level BPE defines it: printable Latin-1
    stands for itself, the others are numbered from U+0100 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _tensors(shape: Shape, seed: int) -> Iterator[tuple[str, F32]]:
    """Names and values of all tensors, in file order.

    Scales: attention scores are spread wide (`sharp`), so each head picks few cells and its output does not
    average out; with that the context, not just the last token, decides what comes next.
    """
    # RandomState's streams are frozen by NumPy's policy (NEP 19); newer generators may change between
    # versions.
    rng = np.random.RandomState(seed)

    def normal(rows: int, columns: int, scale: float) -> F32:
        values: F32 = (rng.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)
        return values

    def ones(count: int, value: float = 1.0) -> F32:
        return np.full(count, value, dtype=np.float32)

    words = word_ids()
    vocab = len(vocabulary()[0])
    sliding = shape.window > 0
    embedding = normal(vocab, shape.embd, np.sqrt(shape.embd))
    if sliding:
        # gemma2 scales embeddings by sqrt(n_embd) and uses them again as output rows: kept small against the
        # layers' output, else the last token would always predict itself.
        embedding *= np.float32(0.02)
        embedding[: words.start] = 0.0
        embedding[words.stop :] = 0.0
    yield "token_embd.weight", embedding
    kv = shape.kv_heads * shape.head_dim
    q = shape.heads * shape.head_dim
    sharp = 2.0
    for i in range(shape.layers):
        block = f"blk.{i}."
        yield block + "attn_norm.weight", ones(shape.embd)
        yield block + "attn_q.weight", normal(q, shape.embd, sharp)
        yield block + "attn_k.weight", normal(kv, shape.embd, sharp)
        yield block + "attn_v.weight", normal(kv, shape.embd, 1.0)
        yield block + "attn_output.weight", normal(shape.embd, q, 4.0)
        yield block + "ffn_norm.weight", ones(shape.embd)
        yield block + "ffn_gate.weight", normal(shape.ff, shape.embd, 2.0)
        yield block + "ffn_up.weight", normal(shape.ff, shape.embd, 2.0)
        yield block + "ffn_down.weight", normal(shape.embd, shape.ff, 1.0)
        if sliding:
            yield block + "post_attention_norm.weight", ones(shape.embd)
            yield block + "post_ffw_norm.weight", ones(shape.embd)
    # The sliding model's output rows are small: its final norm makes up for it.
    yield "output_norm.weight", ones(shape.embd, 12.0 if sliding else 1.0)
    if not sliding:
        output = normal(vocab, shape.embd, 4.0)
        output[: words.start] = 0.0
        output[words.stop :] = 0.0
        yield "output.weight", output


def write(path: Path, seed: int, shape: Shape) -> TinyModel:
    """Write a model of this shape."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"kvpatch-smoke-{shape.arch}-{seed}")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_dimensions(writer, shape, trained=CONTEXT_TRAINED, rope_base=10000.0)
    if shape.window:
        writer.add_sliding_window(shape.window)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if shape.pooling:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    add_tokenizer(writer)
    for name, values in _tensors(shape, seed):
        writer.add_tensor(name, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path=path, seed=seed, shape=shape, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


class Dimensions(Protocol):
    """What the header of a model with grouped-query attention says of it."""

    @property
    def layers(self) -> int: ...
    @property
    def embd(self) -> int: ...
    @property
    def ff(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def add_dimensions(writer: Any, shape: Dimensions, *, trained: int, rope_base: float) -> None:
    """Write what llama.cpp needs to know of the shape; `trained`: cells of the context it was trained for."""
    writer.add_context_length(trained)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.embd)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(rope_base)
    writer.add_rope_dimension_count(shape.head_dim)


def add_tokenizer(writer: Any, filler: int = 0) -> None:
    """Write the vocabulary, and `filler` unused tokens behind it, which only make it larger."""
    tokens, merges = vocabulary()
    control = len(tokens) - len(_CONTROL)
    kinds = [gguf.TokenType.NORMAL] * control + [gguf.TokenType.CONTROL] * len(_CONTROL)
    writer.add_vocab_size(len(tokens) + filler)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"<|filler-{n}|>" for n in range(filler))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * filler])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_eot_token_id(tokens.index(END))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
