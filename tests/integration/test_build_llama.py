"""The main job on the embedded default: the patched source distribution, built, smoke-tested and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpatch import smoke
from tests.integration.conftest import Kvpatch

pytestmark = [pytest.mark.build, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def out(shared_cache: Path) -> Path:
    # In the cache, so that a second run of the tests finds the build fresh.
    return shared_cache / "tests" / "llama.cpp"


@pytest.fixture(scope="module")
def built(kvpatch: Kvpatch, out: Path, patched: smoke.Install) -> dict[str, Any]:
    envelope: dict[str, Any] = kvpatch("build", "--llama-cpp", "sdist", "--out", out)
    return envelope


def test_smoke_passed_with_figures(built: dict[str, Any], out: Path) -> None:
    manifest = json.loads((out / "kvpatch.json").read_text(encoding="utf-8"))
    assert manifest["smoke"]["ok"]
    checks = {check["name"]: check for check in manifest["smoke"]["checks"]}
    assert all(check["ok"] for check in checks.values())
    assert any(check["figures"] for check in checks.values())


def test_verify_and_smoke_alone(built: dict[str, Any], kvpatch: Kvpatch, out: Path, tmp_path: Path) -> None:
    assert kvpatch("verify", out)["data"]["smoked"] is True
    assert kvpatch("smoke", out, "--self-test", "--work-dir", tmp_path)["data"]["report"]["ok"]


def test_a_second_build_does_nothing(built: dict[str, Any], kvpatch: Kvpatch, out: Path) -> None:
    again = kvpatch("build", "--llama-cpp", "sdist", "--out", out)["data"]
    assert {stage["status"] for stage in again["stages"]} == {"fresh"}


def test_the_demo_shows_equal_tokens_and_a_cache_that_shrinks(kvpatch: Kvpatch) -> None:
    report = kvpatch("demo")["data"]["report"]
    assert report["ok"], report["problems"]
    assert report["tokens_equal"]
    assert report["distinct"] >= 32
    rows = report["rows"]
    assert all(row["tokens_equal"] in (True, None) for row in rows)
    assert rows[0]["elastic_mapped"] < rows[0]["stock_mapped"]
    assert rows[-1]["elastic_mapped"] < rows[-2]["elastic_mapped"]
