"""Short end-to-end runs of a patched Ollama (`python -m tests.ollama_e2e` is longer), and proof that they can fail."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvpatch.smoke.install import Install
from tests.integration.conftest import Kvpatch
from tests.ollama_e2e.__main__ import main
from tests.ollama_e2e.setting import PARTS

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(7200)]


def _built(kvpatch: Kvpatch, out: Path, source: str, *words: str) -> Install:
    kvpatch(
        "build" if not words else "compile", "--ollama", "v0.32.15", "--ollama-source", source,
        "--llama-cpp-source", "sdist", "--backend", "cpu", *words, "--out", out,
    )  # fmt: skip
    return Install.detect(out)


@pytest.fixture(scope="module")
def stock_ollama(kvpatch: Kvpatch, shared_cache: Path, ollama_source: str) -> Install:
    """An unpatched build, or that of KVPATCH_TEST_STOCK_OLLAMA."""
    if (made := os.environ.get("KVPATCH_TEST_STOCK_OLLAMA")) is not None:
        return Install.detect(Path(made))
    return _built(kvpatch, shared_cache / "tests" / "ollama-stock", ollama_source, "--stock")


@pytest.fixture(scope="module")
def patched_ollama(
    kvpatch: Kvpatch, shared_cache: Path, ollama_source: str, stock_ollama: Install
) -> Install:
    """The patched one, or that of KVPATCH_TEST_PATCHED_OLLAMA. After the stock one: both compile in one workspace."""
    del stock_ollama
    if (made := os.environ.get("KVPATCH_TEST_PATCHED_OLLAMA")) is not None:
        return Install.detect(Path(made))
    return _built(kvpatch, shared_cache / "tests" / "ollama", ollama_source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all parts: stock is asked once."""
    return tmp_path_factory.mktemp("ollama-e2e")


def _run(stock: Install, patched: Install, folder: Path, *words: object) -> tuple[int, dict[str, Any]]:
    # The same seed for all, so that they share models and stock's answers; its output is shown when it fails.
    argv = ["--stock", stock.root, "--patched", patched.root, "--seed", 1, "--out", folder, *words]
    code = main([str(word) for word in argv])
    return code, json.loads((folder / "ollama-e2e.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", PARTS)
def test_a_part(stock_ollama: Install, patched_ollama: Install, folder: Path, part: str) -> None:
    code, report = _run(stock_ollama, patched_ollama, folder, "--only", part, "--minutes", 1)
    assert [one["name"] for one in report["evidence"]] == [part]
    assert code == 0, report["evidence"][0]["problems"]


def test_without_pressure_it_fails(stock_ollama: Install, patched_ollama: Install, folder: Path) -> None:
    """With room for all nothing sleeps: a run that shows nothing is not good."""
    words = ("--only", "traffic", "--minutes", 0.1, "--env", "OLLAMA_KVCACHED_MEMORY_GB=20GB")
    code, report = _run(stock_ollama, patched_ollama, folder, *words)
    assert code == 1
    assert any("tells of a sleep" in text for text in report["evidence"][0]["problems"])


def test_a_page_too_few_is_noticed(stock_ollama: Install, patched_ollama: Install, folder: Path) -> None:
    """Requests fail, or are answered otherwise."""
    words = ("--only", "traffic", "--minutes", 0.2, "--env", "KVCACHED_TEST_UNDERCOMMIT_PAGES=1")
    code, report = _run(stock_ollama, patched_ollama, folder, *words)
    assert code == 1
    tally = report["evidence"][0]["tally"]
    assert tally is None or tally["failures"] or tally["wrong"], report["evidence"][0]["problems"]
