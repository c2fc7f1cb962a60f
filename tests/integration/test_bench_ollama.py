"""The benchmarks of Ollama on a CPU: everything runs and counts what it should. No times are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpatch.smoke.install import Install
from tests.integration.conftest import Kvpatch
from tests.integration.test_ollama_e2e import patched_ollama, stock_ollama

__all__ = ["patched_ollama", "stock_ollama"]
pytestmark = [pytest.mark.ollama, pytest.mark.timeout(7200)]


def _bench(name: str, kvpatch: Kvpatch, stock: Install, patched: Install, out: Path) -> dict[str, Any]:
    # A budget in which four of the models are awake, and of which one would take all with its cache in full.
    size = ("--shape", "tiny", "--device", "cpu", "--short", "--budget", "36MB")
    where = ("--stock", stock.root, "--patched", patched.root, "--out", out)
    report: dict[str, Any] = kvpatch("bench", name, *where, *size)["data"]["report"]
    assert (out / f"ollama-{name}.json").is_file()
    return report


def _rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # Of two rows with one name the first: what both sides have.
    return {row["name"]: row["sides"] for row in reversed(report["rows"])}


def _holding(report: dict[str, Any]) -> dict[str, bool]:
    return {bound["name"]: bound["holds"] for bound in report["bounds"]}


def test_models_take_turns(
    kvpatch: Kvpatch,
    stock_ollama: Install,
    patched_ollama: Install,
    tmp_path: Path,
) -> None:
    report = _bench("switch", kvpatch, stock_ollama, patched_ollama, tmp_path)
    rows = _rows(report)
    for name in ("throughput, whole request through the API", "first token, two in turn"):
        assert set(rows[name]) == {"stock", "on"}, name
    assert rows["the first sleep of each"]["on"]["n"] == 5
    assert rows["KV, each of out and in"]["on"]["median"] > 0
    holding = _holding(report)
    assert holding["requests whose model slept, of all"]
    assert {
        "single model, throughput through the API",
        "two awake in turn, added to the first token",
        "more models than fit awake, switch to first token",
    } <= set(holding)


def test_models_are_counted_while_awake(
    kvpatch: Kvpatch,
    stock_ollama: Install,
    patched_ollama: Install,
    tmp_path: Path,
) -> None:
    report = _bench("capacity", kvpatch, stock_ollama, patched_ollama, tmp_path)
    rows = _rows(report)
    assert _holding(report)["models awake at once"]
    assert rows["awake at once"]["on"]["median"] == 4
    assert rows["all asleep: ledger"]["on"]["high"] == 0
    asleep = rows["anonymous memory, each, asleep (stock: idle)"]
    assert asleep["on"]["median"] < asleep["stock"]["median"] / 2
