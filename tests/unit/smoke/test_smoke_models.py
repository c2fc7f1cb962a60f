from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from kvpatch.smoke import models
from kvpatch.smoke.models import TinyModel

# Frozen on purpose: other bytes mean other answers than those the checks were tuned for.
_SHA256 = {
    "tiny_llama": "d1345b72d56e6f92a3d95df1f2d3f018c28fc0cfca57d0aea5178691f2aa050c",
    "tiny_swa": "15e2117a73f68c213907eeed3356f5f68aa990445c0b01651baab785c63162fa",
    "tiny_embedding": "0d209f3ea5eae9f5e7b5088ec21b9d81dc46b143f46afe28f0cbdd8ad3db0979",
}
_MAKERS = [models.tiny_llama, models.tiny_swa, models.tiny_embedding]


@pytest.fixture(params=_MAKERS, ids=lambda maker: maker.__name__)
def maker(request: pytest.FixtureRequest) -> Callable[[Path, int], TinyModel]:
    made: Callable[[Path, int], TinyModel] = request.param
    return made


def _value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def test_the_same_bytes_every_time(maker: Callable[[Path, int], TinyModel], tmp_path: Path) -> None:
    first, again = maker(tmp_path / "a.gguf", 1), maker(tmp_path / "sub" / "b.gguf", 1)
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest()
    assert maker(tmp_path / "c.gguf", 2).sha256 != first.sha256
    assert first.path.stat().st_size < 4_000_000
    assert first.sha256 == _SHA256[maker.__name__]


def test_readable_back(maker: Callable[[Path, int], TinyModel], tmp_path: Path) -> None:
    model = maker(tmp_path / "m.gguf", 1)
    reader = gguf.GGUFReader(model.path)
    arch, shape = model.shape.arch, model.shape
    assert _value(reader, "general.architecture") == arch
    assert _value(reader, f"{arch}.block_count") == shape.layers
    assert _value(reader, f"{arch}.attention.head_count_kv") == shape.kv_heads
    assert _value(reader, f"{arch}.context_length") == models.CONTEXT_TRAINED
    tokens = _value(reader, "tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert len(tokens) == len(set(tokens)) == 472
    assert _value(reader, "tokenizer.ggml.model") == "gpt2"
    assert "assistant" in str(_value(reader, "tokenizer.chat_template"))
    sliding = reader.get_field(f"{arch}.attention.sliding_window")
    assert (sliding is not None) == (shape.window > 0)
    assert (reader.get_field(f"{arch}.pooling_type") is not None) == shape.pooling
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    width = shape.kv_heads * shape.head_dim
    assert list(by_name["blk.0.attn_k.weight"].shape) == [shape.embd, width]
    assert all(np.isfinite(tensor.data).all() for tensor in reader.tensors)


def test_only_words_can_win(tmp_path: Path) -> None:
    for model, name in (
        (models.tiny_llama(tmp_path / "l.gguf", 1), "output.weight"),
        (models.tiny_swa(tmp_path / "s.gguf", 1), "token_embd.weight"),
    ):
        rows = next(t.data for t in gguf.GGUFReader(model.path).tensors if t.name == name)
        words = models.word_ids()
        alive = {int(i) for i in np.flatnonzero(np.abs(rows).sum(axis=1))}
        assert alive == set(words)


def test_vocabulary_is_a_byte_level_bpe() -> None:
    tokens, merges = models.vocabulary()
    symbols = tokens[:256]
    assert len(set(symbols)) == 256
    assert symbols[ord("a")] == "a"
    assert symbols[ord(" ")] == "\u0120"
    assert symbols[ord("\n")] == "\u010a"
    known = set(symbols)
    for merge in merges:
        left, right = merge.split(" ")
        assert left in known
        assert right in known
        known.add(left + right)
    assert set(tokens[256 : models.word_ids().stop]) <= known


def test_prompts_are_repeatable_and_differ_by_salt() -> None:
    assert models.prompt_ids(50, 3) == models.prompt_ids(50, 3)
    assert models.prompt_ids(50, 3) != models.prompt_ids(50, 4)
    assert set(models.prompt_ids(500)) <= set(models.word_ids())
    assert len(models.prompt_text(40).split()) == 40


def test_cache_rows_span_whole_pages_a_step(tmp_path: Path) -> None:
    model = models.tiny_llama(tmp_path / "m.gguf", 1)
    assert 256 * model.shape.row_bytes % 4096 == 0
    # K and V, 4 layers, 2 heads of 32 f16 elements
    assert model.cache_bytes(8192) == 2 * 4 * (2 * 32 * 2) * 8192 == 8 * 2**20
