"""The llama.cpp series on the real tree of the pinned source distribution: applied, complete, and repeatable."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvpatch import paths
from kvpatch.patching import load_series
from tests.integration.conftest import Kvpatch


@pytest.fixture(scope="module")
def generated(kvpatch: Kvpatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("apply") / "out"
    data: dict[str, Any] = kvpatch("generate", "--llama-cpp", "sdist", "--out", out)["data"]
    return data


def test_every_hunk_is_found_as_it_is(generated: dict[str, Any]) -> None:
    report = generated["values"]["apply"]["llama.cpp"]["report"]
    assert report["ok"]
    assert len(report["patches"]) == len(generated["plan"]["patches"]["llama.cpp"]) > 0
    hunks = [hunk for patch in report["patches"] for hunk in patch["hunks"]]
    # moved: by the lines that earlier patches of the series added to the file
    assert {hunk["verdict"] for hunk in hunks} <= {"exact", "moved"}


def test_only_call_sites_were_added_to_files_of_upstream(generated: dict[str, Any]) -> None:
    tree = Path(generated["workspace"]) / "llama.cpp"
    base = generated["values"]["apply"]["llama.cpp"]["base_commit"]
    stat = subprocess.run(
        ["git", "-C", tree, "diff", "--numstat", base, "HEAD"], check=True, capture_output=True, text=True
    ).stdout
    added = {line.split()[2]: (int(line.split()[0]), int(line.split()[1])) for line in stat.splitlines()}
    hooks: dict[str, int] = {}
    names = set(generated["plan"]["patches"]["llama.cpp"])
    for patch in load_series(paths.data_dir() / "patches" / "llama.cpp").patches:
        if patch.file.name in names:
            for hook in patch.hooks:
                hooks[hook.path] = hooks.get(hook.path, 0) + 1
    assert {file: plus for file, (plus, _) in added.items()} == hooks  # a hook is one line
    assert all(minus <= 5 for _, minus in added.values())


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
