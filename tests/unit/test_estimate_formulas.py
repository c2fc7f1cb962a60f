"""Sizes by hand: rows, paddings, rings, pages, budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvpatch.estimate import (
    EstimateError,
    Model,
    Settings,
    fit,
    format_bytes,
    map_tokens,
    parse_bytes,
    plan_caches,
)
from kvpatch.estimate.cache import CPU, CUDA
from kvpatch.estimate.layers import Layer
from kvpatch.estimate.sizes import row_bytes, type_of
from kvpatch.estimate.weights import Placed, Weights

MIB = 1 << 20


def model(
    arch: str = "llama",
    count: int = 32,
    *,
    kv_heads: int = 8,
    head: int = 128,
    window: int = 0,
    period: int = 0,
) -> Model:
    layers = tuple(
        Layer(
            index=i,
            kv_heads=kv_heads,
            head_k=head,
            head_v=head,
            feed_forward=14336,
            sliding=bool(window) and i % period < period - 1,
        )
        for i in range(count)
    )
    return Model(
        arch=arch,
        layers=layers,
        context_trained=131072,
        nextn=0,
        window=window,
        kv_from_start=-1,
        mla=False,
        state_r=0,
        state_s=0,
        indexer_size=0,
        causal=True,
    )


@pytest.mark.parametrize(
    ("kind", "elements", "size"),
    [
        ("f16", 128, 256),
        ("bf16", 128, 256),
        ("f32", 128, 512),
        ("q8_0", 128, 4 * 34),
        ("q4_0", 128, 4 * 18),
        ("q4_1", 128, 4 * 20),
        ("q5_0", 128, 4 * 22),
        ("q5_1", 128, 4 * 24),
        ("iq4_nl", 128, 4 * 18),
        ("q4_k", 256, 144),
    ],
)
def test_a_row(kind: str, elements: int, size: int) -> None:
    assert row_bytes(type_of(kind), elements) == size


def test_a_row_is_whole_blocks() -> None:
    with pytest.raises(EstimateError, match="40 elements cannot be q8_0, whose blocks hold 32"):
        row_bytes(type_of("q8_0"), 40)


def test_an_8b_model_at_131072_cells_has_16_gib_of_f16() -> None:
    """32 layers, K and V, 8 heads of 128, 2 bytes: 131,072 bytes a token; 16 GiB as a stock server was seen to take."""
    caches = plan_caches(model(), Settings())
    assert caches.token_bytes == 32 * 2 * 8 * 128 * 2 == 131072
    assert caches.nbytes(CUDA) == caches.nbytes(CPU) == 131072 * 131072 == 16 << 30


@pytest.mark.parametrize(
    ("asked", "parallel", "unified", "context", "slot"),
    [
        (1, 1, True, 256, 256),
        (1000, 4, True, 1024, 1024),
        (1000, 4, False, 1024, 256),
        (
            1000,
            3,
            False,
            1536,
            512,
        ),  # 1024 / 3 = 341, rounded up to 512, three of which are more than was asked for
        (4096, 1, False, 4096, 4096),
    ],
)
def test_the_context_is_rounded_up(asked: int, parallel: int, unified: bool, context: int, slot: int) -> None:
    caches = plan_caches(model(), Settings(context=asked, parallel=parallel, unified=unified))
    assert (caches.context, caches.context_slot) == (context, slot)
    assert caches.nbytes(CPU) == context * 131072
    assert any("sequences of" in w for w in caches.warnings) == (context == 1536)


@pytest.mark.parametrize(
    ("context", "parallel", "unified", "ubatch", "ring"),
    [
        (32768, 1, True, 512, 1536),  # 1024 + 512
        (32768, 4, True, 512, 4608),  # 4 * 1024 + 512
        (32768, 4, False, 512, 1536),  # a ring a stream
        (32768, 1, True, 100, 1280),  # 1124, rounded up
        (1024, 1, True, 512, 1024),  # never more than the context
        (300, 1, True, 512, 512),
    ],
)
def test_a_ring_holds_the_windows_and_a_batch(
    context: int, parallel: int, unified: bool, ubatch: int, ring: int
) -> None:
    settings = Settings(context=context, parallel=parallel, unified=unified, ubatch=ubatch)
    full, sliding = plan_caches(model("gemma3", 6, window=1024, period=6), settings).caches
    assert (full.kind, full.layers, sliding.kind, sliding.layers) == (
        "full attention",
        1,
        "sliding window",
        5,
    )
    assert sliding.cells == ring
    assert sliding.nbytes(CPU) == 5 * 4096 * ring * sliding.streams


def test_full_rings() -> None:
    full, sliding = plan_caches(
        model("gemma3", 6, window=1024, period=6), Settings(context=8192, swa_full=True)
    ).caches
    assert sliding.cells == full.cells == 8192


def test_cuda_pads_the_end_of_a_quantised_tensor_to_512_elements() -> None:
    """A row of 128 elements of q8_0 is padded by 384 more: 12 blocks of 34 bytes, then to a multiple of 128."""
    small = model(count=1, kv_heads=1)
    settings = Settings(context=256, type_k="q8_0", type_v="f16")
    rows = 256 * 136
    assert plan_caches(small, settings).nbytes(CPU) == rows + 256 * 256
    assert rows + 12 * 34 == 35224
    assert plan_caches(small, settings).nbytes(CUDA) == 35328 + 256 * 256


def test_v_without_flash_attention_is_as_wide_as_the_widest() -> None:
    base = model(count=2, kv_heads=2)
    mixed = replace(base, layers=(base.layers[0], replace(base.layers[1], kv_heads=1)))
    rows = {True: (256 + 128) * 2, False: (256 + 256) * 2}
    for flash_attn, v_row in rows.items():
        caches = plan_caches(mixed, Settings(context=256, flash_attn=flash_attn))
        assert caches.token_bytes == (256 + 128) * 2 + v_row


def test_what_llama_cpp_refuses_is_refused() -> None:
    for settings, words in (
        (Settings(context=-1), "cannot be negative"),
        (Settings(parallel=0), "0 sequences"),
        (Settings(parallel=257), "257 sequences"),
        (Settings(type_k="q6_k"), "no type of a KV cache"),
        (Settings(type_v="q8_0", flash_attn=False), "needs flash attention"),
        (Settings(context=256, parallel=300), "300 sequences"),
    ):
        with pytest.raises(EstimateError, match=words):
            plan_caches(model(), settings)
    with pytest.raises(EstimateError, match="do not divide a head's 80 elements of K"):
        plan_caches(model(head=80), Settings(type_k="q8_0"))
    with pytest.raises(EstimateError, match="must be the same type"):
        plan_caches(replace(model("deepseek2"), mla=True), Settings(type_k="q8_0"))
    with pytest.raises(EstimateError, match="names no context length"):
        plan_caches(replace(model(), context_trained=0), Settings())


def test_more_than_the_trained_context_is_a_warning() -> None:
    assert plan_caches(model(), Settings(context=131072)).warnings == ()
    (warning,) = plan_caches(model(), Settings(context=131073)).warnings
    assert warning == "131328 cells a sequence are more than the 131072 the model was trained on"


def test_latent_attention_has_no_v() -> None:
    """A row of 512 + 64 elements a layer."""
    latent = replace(model("deepseek2", 4, kv_heads=1, head=576), mla=True)
    (cache,) = plan_caches(latent, Settings(context=1024)).caches
    assert (cache.kind, len(cache.tensors), cache.nbytes(CUDA)) == (
        "latent attention (MLA)",
        4,
        4 * 1152 * 1024,
    )


def test_a_recurrent_state_is_f32_of_every_sequence() -> None:
    """mamba-130m: 24 layers; 3 * 1536 elements of R and 16 * 1536 of S."""
    base = replace(model("mamba", 24), state_r=3 * 1536, state_s=16 * 1536)
    (cache,) = plan_caches(base, Settings(parallel=2, type_k="q8_0")).caches
    assert (cache.kind, cache.nbytes(CPU)) == ("recurrent state", 24 * 19 * 1536 * 4 * 2)


# ------------------------------------------------------------------------------------------------------- pages --


def test_a_page_step() -> None:
    """8B: a cell has 2,048 bytes in each of 64 tensors, so a page of 2 MiB is 1,024 cells, a step 128 MiB."""
    mapped = map_tokens(plan_caches(model(), Settings()), CUDA, page=2 * MIB, tokens=1000)
    (cache,) = mapped.caches
    assert (cache.step_bytes, cache.step_tokens) == (128 * MIB, 1024)
    assert (mapped.mapped, mapped.reserved) == (128 * MIB, 16 << 30)
    # 1,000 tokens are read as 1,024 cells; the next 256 are on another page
    assert mapped.ahead == 128 * MIB


@pytest.mark.parametrize(
    ("tokens", "pages", "ahead"), [(0, 0, 0), (1, 1, 0), (768, 1, 0), (769, 1, 1), (1025, 2, 0)]
)
def test_mapped_at_so_many_tokens(tokens: int, pages: int, ahead: int) -> None:
    mapped = map_tokens(plan_caches(model(), Settings()), CUDA, page=2 * MIB, tokens=tokens)
    assert (mapped.mapped, mapped.ahead) == (pages * 128 * MIB, ahead * 128 * MIB)


def test_kernels_read_a_tile_beyond_a_quantised_row() -> None:
    """One tensor of 1,024 elements a row of q8_0: 1,088 bytes; 256 cells are 278,528, a multiple of 4,096 as it is."""
    one = model(count=1)
    caches = plan_caches(one, Settings(context=4096, type_k="q8_0", type_v="q8_0"))
    at = {d.name: map_tokens(caches, d, page=4096, tokens=256).mapped for d in (CPU, CUDA)}
    assert at == {"cpu": 2 * 278528, "cuda": 2 * (278528 + 4096)}


def test_v_without_flash_attention_is_mapped_in_full() -> None:
    caches = plan_caches(model(count=1), Settings(context=4096, flash_attn=False))
    assert map_tokens(caches, CPU, page=4096, tokens=256).mapped == 2048 * 256 + 2048 * 4096
    assert map_tokens(caches, CPU, page=4096, tokens=0).mapped == 0


def test_a_ring_is_mapped_once() -> None:
    caches = plan_caches(model("gemma3", 6, window=1024, period=6), Settings(context=32768, parallel=1))
    _, ring = map_tokens(caches, CPU, page=4096, tokens=20000).caches
    assert ring.mapped == ring.reserved == 5 * 4096 * 1536
    assert ring.ahead == 0


def test_pages_and_tokens_have_limits() -> None:
    caches = plan_caches(model(), Settings(context=1024))
    for page in (0, 2048, 5000, 3 * MIB):
        with pytest.raises(EstimateError, match="power of two"):
            map_tokens(caches, CUDA, page=page, tokens=1)
    with pytest.raises(EstimateError, match="1025 tokens do not fit"):
        map_tokens(caches, CUDA, page=4096, tokens=1025)


# ------------------------------------------------------------------------------------------------------- budgets --


def test_how_many_fit() -> None:
    """4.08 GB of weights and a context of 64K in 20 GB, 527 MiB a process: one stock, four elastic."""
    weights = Weights(
        device=Placed(device="cuda", nbytes=4_080_000_000, tensors=291),
        host=None,
        file_bytes=0,
        tied_bytes=0,
        skipped_bytes=0,
        moved=(),
    )
    caches = plan_caches(model(), Settings(context=65536, parallel=1))
    mapped = map_tokens(caches, CUDA, page=2 * MIB, tokens=1000)
    found = fit(weights, caches, mapped, CUDA, budget=20_000_000_000)
    assert found.stock.total == 4_080_000_000 + (8 << 30) + 527 * MIB
    assert found.awake.total == 1946 * 2 * MIB + 256 * MIB + 527 * MIB
    assert (found.stock_models, found.awake_models) == (1, 4)
    # (20e9 - 4,902,092,800) / 527 MiB
    assert found.asleep_models == (20_000_000_000 - found.awake.total) // (527 * MIB) == 27


def test_a_budget_smaller_than_one_model() -> None:
    weights = Weights(
        device=Placed(device="cpu", nbytes=MIB, tensors=1),
        host=None,
        file_bytes=0,
        tied_bytes=0,
        skipped_bytes=0,
        moved=(),
    )
    caches = plan_caches(model(count=1), Settings(context=256))
    mapped = map_tokens(caches, CPU, page=4096, tokens=0)
    small = fit(weights, caches, mapped, CPU, budget=1000)
    assert (small.stock_models, small.awake_models, small.asleep_models) == (0, 0, 0)
    # on the host a sleeper takes nothing
    assert fit(weights, caches, mapped, CPU, budget=10 * MIB).asleep_models is None
    with pytest.raises(EstimateError, match="cannot be negative"):
        fit(weights, caches, mapped, CPU, budget=1, compute=-1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("20 g", 20 * 10**9),
        ("2MiB", 2 * MIB),
        ("4kib", 4096),
        ("4096", 4096),
        ("1.5Gi", 3 << 29),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "20XB", "1e9", "2,5GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(EstimateError, match=r"--budget .* is no size"):
        parse_bytes(text, "--budget")


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 * MIB, 5 << 29)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "3.00 MiB",
        "2.50 GiB",
    ]
