"""The main job on the real release: Ollama built from a local source, smoke-tested and verified."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Kvpatch

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def out(shared_cache: Path) -> Path:
    return shared_cache / "tests" / "ollama"


@pytest.fixture(scope="module")
def arguments(ollama_source: str, out: Path) -> list[str]:
    return [
        "--ollama", "v0.32.15", "--ollama-source", ollama_source,
        "--llama-cpp-source", "sdist", "--backend", "cpu", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def built(kvpatch: Kvpatch, arguments: list[str]) -> dict[str, Any]:
    envelope: dict[str, Any] = kvpatch("build", *arguments)
    return envelope


def test_smoke_passed(built: dict[str, Any], out: Path) -> None:
    manifest = json.loads((out / "kvpatch.json").read_text(encoding="utf-8"))
    assert manifest["smoke"]["ok"]
    assert manifest["pin_status"] == "verified"
    assert any("b10488" in warning for warning in manifest["warnings"])


def test_the_layout_is_that_of_upstream_s_release(built: dict[str, Any], out: Path) -> None:
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    ours = {"bin/kvcachedd", "lib/ollama/libkvcached.so", "kvpatch.json"}
    assert {"bin/ollama", "lib/ollama/llama-server", *ours} <= names
    assert {name.split("/")[0] for name in names} == {"bin", "lib", "kvpatch.json"}


def test_the_binary_names_series_and_llama_cpp(built: dict[str, Any], out: Path) -> None:
    text = subprocess.run([out / "bin" / "ollama", "-v"], capture_output=True, text=True, check=True).stdout
    assert "0.32.15" in text
    assert built["data"]["plan"]["series"] in text
    assert "4df29be4f" in text


def test_a_second_build_does_nothing(built: dict[str, Any], kvpatch: Kvpatch, arguments: list[str]) -> None:
    again = kvpatch("build", *arguments)["data"]
    assert {stage["status"] for stage in again["stages"]} == {"fresh"}


def test_the_source_is_only_read(ollama_source: str, kvpatch: Kvpatch, arguments: list[str]) -> None:
    root = Path(ollama_source)
    if not root.is_dir():
        pytest.skip("the source is a URL")

    def digest() -> str:
        rows = [
            f"{p.relative_to(root)} {p.stat().st_size} {p.stat().st_mtime_ns}"
            for p in sorted(root.rglob("*"))
        ]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    before = digest()
    kvpatch("generate", *arguments, "--from", "fetch")
    assert digest() == before


def test_an_unknown_release_says_what_exists(ollama_source: str, kvpatch: Kvpatch, tmp_path: Path) -> None:
    error = kvpatch(
        "build", "--ollama", "v9.9.9", "--ollama-source", ollama_source, "--out", tmp_path / "out", code=4
    )["errors"][0]
    assert "no such tag" in error["message"]
    assert "v0.32.15" in error["hint"]


def test_another_llama_cpp_needs_permission(ollama_source: str, kvpatch: Kvpatch, tmp_path: Path) -> None:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text("", encoding="utf-8")
    error = kvpatch(
        "build", "--plan", "--ollama", "v0.32.15", "--ollama-source", ollama_source,
        "--llama-cpp-source", folder, "--out", tmp_path / "out", code=4,
    )["errors"][0]  # fmt: skip
    assert "--allow-pin-mismatch" in error["hint"]
