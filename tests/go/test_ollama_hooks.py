"""The hooks in a real Ollama tree: the series placed in every release of its range, and tested in the pinned one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

from kvpatch import generate, patching, paths
from kvpatch.sources import OLLAMA, Pin, Store

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
SERIES = ROOT / "patches" / "ollama" / "llama-server"
TESTS = ROOT / "templates" / "ollama" / "tests"
PINNED = "v0.32.15"
PACKAGES = ("./kvcached/", "./server/", "./llm/", "./envconfig/", "./api/", "./cmd/")
CONTEXT = {
    "version": "0.0.0",
    "series": "test-0000000",
    "ollama": {"version": PINNED, "commit": "0" * 40},
    "llama_cpp": {"commit": "0" * 40, "pin": "b0"},
}


@pytest.fixture(scope="module")
def store() -> Store:
    return Store(paths.cache_root())


def releases(store: Store, source: str) -> list[str]:
    found = [tag for tag in store.tags(OLLAMA, source) if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    return sorted((tag for tag in found if Version(tag) >= Version("0.30.0")), key=Version)


def test_every_release_takes_the_series(store: Store, ollama_source: str, tmp_path: Path) -> None:
    """Each hunk's place is unique and each hook is there once, in every release from v0.30.0 on."""
    tags = releases(store, ollama_source)
    assert PINNED in tags
    series = patching.load_series(SERIES)
    for tag in tags:
        pin = Pin(ref=tag, commit=None, sha256=None)
        tree = store.materialize(store.resolve(OLLAMA, ollama_source, pin), tmp_path / "tree")
        patches = series.select(Version(tag.removeprefix("v")))
        assert len(patches) == 5
        report = patching.try_series(tree.path, tree.base_commit, patches)
        assert report.ok, f"{tag}\n" + "\n".join(report.lines())


def test_hooks_in_the_pinned_release(store: Store, ollama_source: str, tmp_path: Path) -> None:
    """Vetted, and tested with upstream's own mocks: leases and processes, room in the scheduler, /api/ps, settings."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler on PATH")
    pin = Pin(ref=PINNED, commit=None, sha256=None)
    tree = store.materialize(store.resolve(OLLAMA, ollama_source, pin), tmp_path / "ollama")
    patches = patching.load_series(SERIES).select(Version(PINNED.removeprefix("v")))
    patching.apply_series(tree.path, tree.base_commit, patches)
    generate.write(generate.render(ROOT, "ollama", CONTEXT), tree.path)
    for test in TESTS.glob("*_kvcached*_test.go"):
        package, _, name = test.name.partition("_")
        shutil.copy(test, tree.path / package / name)

    env = {k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_", "KVCACHED_"))}
    env |= {"GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [go, *words], cwd=tree.path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"go {' '.join(words)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    run("vet", *PACKAGES)
    output = run("test", "-v", "-count=1", "-run", "KVCached", "./server/", "./llm/")
    assert len(re.findall(r"^--- PASS: TestKVCached", output, re.MULTILINE)) >= 10
    assert "--- SKIP" not in output
