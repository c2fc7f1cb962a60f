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
OTHERS = ("v0.30.0", "v0.30.8", "v0.30.10", "v0.32.3", "v0.32.5")
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
        assert len(patches) == len(list(SERIES.glob("*.patch")))
        report = patching.try_series(tree.path, tree.base_commit, patches)
        assert report.ok, f"{tag}\n" + "\n".join(report.lines())


def patched(store: Store, source: str, tag: str, tree: Path) -> Path:
    """A checkout of a release with the series applied and the templates laid over it."""
    pin = Pin(ref=tag, commit=None, sha256=None)
    found = store.materialize(store.resolve(OLLAMA, source, pin), tree)
    patches = patching.load_series(SERIES).select(Version(tag.removeprefix("v")))
    patching.apply_series(found.path, found.base_commit, patches)
    generate.write(generate.render(ROOT, "ollama", CONTEXT), found.path)
    return found.path


def run_go(tree: Path, *words: str) -> str:
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler on PATH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_", "KVCACHED_"))}
    env |= {"GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false"}
    done = subprocess.run([go, *words], cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"go {' '.join(words)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("tag", OTHERS)
def test_hooks_compile_in_other_releases(store: Store, ollama_source: str, tmp_path: Path, tag: str) -> None:
    """With each version of the scheduler that the releases have, next to the pinned one."""
    run_go(patched(store, ollama_source, tag, tmp_path / "ollama"), "build", *PACKAGES)


def test_hooks_in_the_pinned_release(store: Store, ollama_source: str, tmp_path: Path) -> None:
    """Vetted, and tested with upstream's mocks: leases and processes, the scheduler, contexts, /api/ps, settings."""
    tree = patched(store, ollama_source, PINNED, tmp_path / "ollama")
    fake = tree / "kvcached" / "kvcachedtest" / "ledger.go"
    fake.parent.mkdir()
    shutil.copy(TESTS / "kvcachedtest_ledger.go", fake)
    for test in TESTS.glob("*_kvcached*_test.go"):
        package, _, name = test.name.partition("_")
        shutil.copy(test, tree / package / name)

    run_go(tree, "vet", *PACKAGES)
    output = run_go(
        tree, "test", "-race", "-v", "-count=1", "-run", "KVCached", "./server/", "./llm/", "./cmd/"
    )
    assert len(re.findall(r"^--- PASS: TestKVCached", output, re.MULTILINE)) >= 50
    assert "--- SKIP" not in output
