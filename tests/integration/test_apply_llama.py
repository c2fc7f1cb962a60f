"""The llama.cpp series on the real tree of the pinned source distribution: applied, complete, and repeatable."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Kvpatch


@pytest.fixture(scope="module")
def generated(kvpatch: Kvpatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("apply") / "out"
    data: dict[str, Any] = kvpatch("generate", "--llama-cpp", "sdist", "--out", out)["data"]
    return data


def test_every_hunk_is_exact(generated: dict[str, Any]) -> None:
    report = generated["values"]["apply"]["llama.cpp"]["report"]
    assert report["ok"]
    assert len(report["patches"]) == len(generated["plan"]["patches"]["llama.cpp"]) > 0
    hunks = [hunk for patch in report["patches"] for hunk in patch["hunks"]]
    assert {hunk["verdict"] for hunk in hunks} == {"exact"}


def test_only_call_sites_were_added_to_files_of_upstream(generated: dict[str, Any]) -> None:
    tree = Path(generated["workspace"]) / "llama.cpp"
    base = generated["values"]["apply"]["llama.cpp"]["base_commit"]
    stat = subprocess.run(
        ["git", "-C", tree, "diff", "--numstat", base, "HEAD"], check=True, capture_output=True, text=True
    ).stdout
    added = {line.split()[2]: (int(line.split()[0]), int(line.split()[1])) for line in stat.splitlines()}
    assert set(added) == {"src/llama-kv-cache.cpp", "tools/server/server-context.cpp"}
    assert all(plus <= 20 and minus <= 3 for plus, minus in added.values())


def test_generated_files_are_there_and_untracked(generated: dict[str, Any]) -> None:
    tree = Path(generated["workspace"]) / "llama.cpp"
    names = set(generated["values"]["generate"]["llama.cpp"])
    listed = subprocess.run(
        ["git", "-C", tree, "status", "--porcelain", "--untracked-files=all"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert {line[3:] for line in listed.splitlines() if line.startswith("??")} == names


def test_again_is_the_same_commit_and_does_nothing(generated: dict[str, Any], kvpatch: Kvpatch) -> None:
    again = kvpatch("generate", "--llama-cpp", "sdist", "--out", generated["out"])["data"]
    assert {stage["status"] for stage in again["stages"]} == {"fresh"}
    forced = kvpatch("generate", "--llama-cpp", "sdist", "--out", generated["out"], "--from", "fetch")["data"]
    assert forced["values"]["apply"] == generated["values"]["apply"]
