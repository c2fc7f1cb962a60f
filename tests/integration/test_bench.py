"""The server benchmarks on a CPU: everything runs and counts what it should. No times are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpatch import smoke
from kvpatch.bench import device, models, servers
from kvpatch.smoke.models import prompt_ids
from tests.integration.conftest import Kvpatch

pytestmark = [pytest.mark.build, pytest.mark.timeout(600)]


def _bench(
    name: str, kvpatch: Kvpatch, stock: smoke.Install, patched: smoke.Install, out: Path
) -> dict[str, Any]:
    where = ("--stock", stock.root, "--patched", patched.root, "--out", out)
    size = ("--shape", "tiny", "--device", "cpu", "--short")
    report: dict[str, Any] = kvpatch("bench", name, *where, *size)["data"]["report"]
    assert (out / f"{name}.json").is_file()
    return report


def _holding(report: dict[str, Any]) -> dict[str, bool]:
    return {bound["name"]: bound["holds"] for bound in report["bounds"]}


def test_overhead_has_every_figure_of_all_sides(
    kvpatch: Kvpatch, stock: smoke.Install, patched: smoke.Install, tmp_path: Path
) -> None:
    report = _bench("overhead", kvpatch, stock, patched, tmp_path)
    rows = {(row["section"], row["name"]): row for row in report["rows"]}
    for key in (
        ("decode", "batch 1"),
        ("decode", "batch 4"),
        ("prefill", "512 tokens"),
        ("steps", "that map"),
    ):
        assert set(rows[key]["sides"]) == {"stock", "off", "on"}, key
    assert {
        "decode, batch 1",
        "p99.9 of a step over stock's",
        "steps that map over those that do not",
    } <= set(_holding(report))


def test_idle_memory_and_content_are_as_bound(
    kvpatch: Kvpatch, stock: smoke.Install, patched: smoke.Install, tmp_path: Path
) -> None:
    holding = _holding(_bench("idle", kvpatch, stock, patched, tmp_path))
    for name in (
        "KV in use",
        "KV mapped",
        "mapped while asleep",
        "prompt tokens processed again after sleep",
    ):
        assert holding[name], name
    assert "wake to first token" in holding


def test_three_models_answer_in_turn(
    kvpatch: Kvpatch, stock: smoke.Install, patched: smoke.Install, tmp_path: Path
) -> None:
    report = _bench("switch", kvpatch, stock, patched, tmp_path)
    assert _holding(report)["models awake at once, weights mapped"]
    assert {row["section"] for row in report["rows"]} == {"two in turn", "3 awake", "one awake at a time"}


def test_what_a_model_says_depends_on_all_of_its_context(stock: smoke.Install, tmp_path: Path) -> None:
    model = models.ensure(tmp_path, models.TINY)
    setup = servers.Setup(stock=stock, patched=stock, model=model, device=device.Cpu(), work=tmp_path)
    side = setup.side("stock")
    with servers.client(setup, side, servers.spec(setup, side, context=1024)) as one:
        asked = prompt_ids(300)
        plain = one.complete(asked, 64, cached=False).tokens
        assert len(set(plain)) > 24
        for place in (0, 100, 200, 299):
            changed = list(asked)
            changed[place] = prompt_ids(300, 5)[place]
            other = one.complete(changed, 64, cached=False).tokens
            assert sum(a != b for a, b in zip(plain, other, strict=True)) > 32, place
        streamed = one.stream(asked, 64, cached=False)
        assert streamed.tokens == plain
        assert len(streamed.step_ms) == 63
