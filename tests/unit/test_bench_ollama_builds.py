"""Which builds the benchmarks of Ollama take, and what they may be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpatch.bench import ollama_servers
from kvpatch.cli.app import app
from kvpatch.errors import UsageError
from kvpatch.stages.output import MANIFEST


def _build(root: Path, *, stock: bool, release: str = "v0.32.15", ollama: bool = True) -> Path:
    library = root / "lib" / "ollama" if ollama else root / "bin"
    programs = [library / "llama-server", *([root / "bin" / "ollama"] if ollama else [])]
    for path in programs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755)
    if not stock:
        (library / "libkvcached.so").touch()
    made = {
        "schema": 1, "stock": stock, "release": release, "label": "x", "series": "x",
        "upstream_commits": {"ollama": release, "llama.cpp": "1"},
    }  # fmt: skip
    (root / MANIFEST).write_text(json.dumps(made), encoding="utf-8")
    return root


def test_builds_must_be_stock_and_patched_of_one_release(tmp_path: Path) -> None:
    stock, patched = _build(tmp_path / "s", stock=True), _build(tmp_path / "p", stock=False)
    other = _build(tmp_path / "o", stock=False, release="v0.32.14")
    plain = _build(tmp_path / "l", stock=False, ollama=False)
    _, _, facts = ollama_servers.installs(stock, patched)
    assert facts["patched"]["release"] == "v0.32.15"
    for pair, text in (
        ((patched, stock), "is not a stock build"),
        ((stock, stock), "is not a patched build"),
        ((stock, other), "two releases"),
        ((stock, plain), "has no ollama"),
    ):
        with pytest.raises(UsageError, match=text):
            ollama_servers.installs(*pair)


def test_what_a_build_cannot_be_asked_is_a_usage_error(tmp_path: Path) -> None:
    ollama = [_build(tmp_path / "s", stock=True), _build(tmp_path / "p", stock=False)]
    llama = [
        _build(tmp_path / "ls", stock=True, ollama=False),
        _build(tmp_path / "lp", stock=False, ollama=False),
    ]
    for words, builds, text in (
        (["capacity"], llama, "measures Ollama"),
        (["switch", "--model", "x.gguf"], ollama, "--model cannot be given"),
        (["overhead", "--budget", "20GB"], llama, "has no --budget"),
        (["switch", "--budget", "much"], ollama, "is no size"),
        (["switch", "--context", "100"], ollama, "cells at least"),
    ):
        argv = ["bench", *words, "--stock", str(builds[0]), "--patched", str(builds[1]), "--device", "cpu"]
        done = CliRunner().invoke(app, [*argv, "--out", str(tmp_path / "out"), "--json"])
        assert text in done.output + repr(done.exception), words
        assert done.exit_code, words
