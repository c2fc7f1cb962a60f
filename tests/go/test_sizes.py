"""Sizes of caches that package kvcached derives from metadata, against `kvpatch estimate`: equal to the byte.

That is in turn compared with what libllama allocates (tests/integration/test_estimate.py), with the same metadata.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpatch import estimate, smoke
from kvpatch.estimate import archs
from kvpatch.estimate.cache import DEVICES
from kvpatch.estimate.mapped import PAGES
from kvpatch.estimate.reader import GgufModel
from kvpatch.estimate.sizes import KV_TYPES
from tests.integration.test_estimate import SETTINGS, SMALL_HEADS, VARIANTS
from tests.llama_memory import shapes

ROOT = Path(__file__).resolve().parents[2]
S = estimate.Settings
TOKENS = 700  # three steps of 256 cells
Ask = Callable[[Iterable[tuple[GgufModel, S]]], "list[list[dict[str, Any]]]"]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """The sizes of models in the package's words: of the host and of CUDA for each question."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler on PATH")
    module = tmp_path_factory.mktemp("sizes") / "go_shim"
    shutil.copytree(ROOT / "go_shim", module)
    shutil.copytree(Path(__file__).with_name("sizes"), module / "sizes")
    program = module / "sizes" / "sizes"
    subprocess.run([go, "build", "-o", program, "./sizes"], cwd=module, check=True)

    def run(questions: Iterable[tuple[GgufModel, S]]) -> list[list[dict[str, Any]]]:
        lines = [
            json.dumps(
                {
                    "metadata": model.metadata,
                    "tokens": TOKENS,
                    "context": {
                        "cells": s.context,
                        "parallel": s.parallel,
                        "unified": s.unified,
                        "typek": s.type_k,
                        "typev": s.type_v,
                        "flashattention": s.flash_attn,
                        "batch": s.batch,
                        "ubatch": s.ubatch,
                        "swafull": s.swa_full,
                    },
                }
            )
            for model, s in questions
        ]
        done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(lines)
        return answers

    return run


def made_up(arch: str, **more: Any) -> GgufModel:
    """A model of that architecture with the metadata that test_estimate.py has libllama load."""
    values = {
        key.removeprefix("/") if key.startswith("/") else f"{arch}.{key}": value
        for key, value in shapes.keys(arch, experts=False, **more).items()
    }
    metadata = {"general.architecture": arch, **values}
    return GgufModel(paths=(Path(f"{arch}.gguf"),), arch=arch, tensors=(), metadata=metadata)


def expected(gguf: GgufModel, settings: S, device: str) -> dict[str, int] | None:
    """None where llama.cpp would refuse."""
    try:
        caches = estimate.plan_caches(estimate.derive(gguf), settings)
    except estimate.EstimateError:
        return None
    on, page = DEVICES[device], PAGES[device]
    tokens = min(TOKENS, caches.context_slot)
    return {
        "Cells": caches.context,
        "Sequence": caches.context_slot,
        "Ubatch": caches.ubatch,
        "Bytes": caches.nbytes(on),
        "Reserved": (mapped := estimate.map_tokens(caches, on, page=page, tokens=tokens)).reserved,
        "Mapped": mapped.mapped,
        "NeedReserved": mapped.reserved,
        "NeedFirst": estimate.map_tokens(caches, on, page=page, tokens=1).mapped,
    }


def compare(ask: Ask, questions: list[tuple[GgufModel, S]]) -> int:
    """How many contexts both could tell, and that they told the same."""
    told = 0
    for (model, settings), answers in zip(questions, ask(questions), strict=True):
        for device, said in zip(("cpu", "cuda"), answers, strict=True):
            want = expected(model, settings, device)
            assert (said["Error"] == "") == (want is not None), (model.arch, settings, said)
            assert (said["Inexact"] == "") == (want is not None), (model.arch, settings, said)
            if want is not None:
                assert {key: said[key] for key in want} == want, (model.arch, settings, device)
                told += 1
    return told


@pytest.mark.parametrize("arch", sorted(archs.KNOWN))
def test_every_architecture(ask: Ask, arch: str) -> None:
    assert compare(ask, [(made_up(arch), s) for s in SETTINGS]) >= 6


@pytest.mark.parametrize(("arch", "more"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_other_metadata(ask: Ask, arch: str, more: dict[str, Any]) -> None:
    assert compare(ask, [(made_up(arch, **more), s) for s in SETTINGS]) >= 6


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek2", "jamba"])
def test_every_setting(ask: Ask, arch: str) -> None:
    model = made_up(arch, **(SMALL_HEADS if arch in ("llama", "gemma2") else {}))
    settings = [
        S(context=4000, parallel=n, unified=u, flash_attn=f, type_k=k, type_v=v)
        for n in (1, 3)
        for u in (True, False)
        for f in (True, False)
        for k in KV_TYPES
        for v in KV_TYPES
    ]
    # llama.cpp refuses a quantised V without flash attention, and two types where K and V are cached together
    pairs = 9 + 3 if arch == "deepseek2" else 9 * 9 + 9 * 3
    assert compare(ask, [(model, s) for s in settings]) == 2 * 4 * pairs


@pytest.mark.parametrize(
    "write", [smoke.models.tiny_llama, smoke.models.tiny_swa, smoke.models.tiny_embedding]
)
def test_models_of_the_smoke_tests(ask: Ask, tmp_path: Path, write: Callable[[Path, int], Any]) -> None:
    path = write(tmp_path / "model.gguf", 1).path
    model = estimate.read(path)
    assert compare(ask, [(model, s) for s in SETTINGS]) >= 6
    said = ask([(model, SETTINGS[0])])[0][0]
    assert said["Bytes"] == estimate.estimate(path, SETTINGS[0], device="cpu").to_json()["cache_bytes"]


def test_damaged_metadata_is_estimated_from_above(ask: Ask) -> None:
    whole = made_up("llama")
    for key, value in (
        ("llama.block_count", 0),
        ("llama.attention.head_count_kv", (1, 2)),
        ("llama.context_length", None),
        ("general.architecture", "nobody"),
    ):
        metadata = {k: v for k, v in {**whole.metadata, key: value}.items() if v is not None}
        said = ask([(replace(whole, metadata=metadata), S(context=512))])[0][0]
        assert said["Error"], key
        assert said["Inexact"] == said["Error"], key


@pytest.mark.parametrize("arch", sorted(archs.KNOWN))
def test_an_estimate_from_above_is_enough(ask: Ask, arch: str) -> None:
    """Under a name that has no rules, no model is said to need less than under its own."""
    model = made_up(arch)
    for settings, answers in zip(SETTINGS, ask([(model, s) for s in SETTINGS]), strict=True):
        for said in answers:
            if not said["Error"]:
                assert said["Upper"] >= said["Reserved"], (settings, said)
                assert said["UpperStep"] >= said["NeedFirst"], (settings, said)
