"""The command line around the build: help, releases, the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_upstream import envelope

from kvpatch import cli


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvpatch ")
    assert cli.run(["build", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--ollama", "--llama-cpp-source", "--plan", "--from", "--until", "--json", "--locked"):
        assert option in text


def test_versions_lists_every_release_with_its_pin(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["versions", "--json"]) == 0
    rows = envelope(capsys)["data"]["releases"]
    default = next(row for row in rows if row["version"] == "v0.32.15")
    assert default["llama_cpp"] == "b10488"
    assert default["verified_with"] == ["4df29be4f"]
    assert default["patches"] >= 1


def test_versions_lists_the_dates_of_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["versions", "--llama-cpp", "--json"]) == 0
    rows = envelope(capsys)["data"]["llama_cpp"]
    assert [row["date"] for row in rows] == sorted(row["date"] for row in rows)
    one = next(row for row in rows if row["version"] == "0.3.35")
    assert (one["commit"], one["date"], one["status"]) == ("4df29be4f", "2026-08-13", "built")
    assert one["patches"] >= 1
    assert cli.run(["versions", "--llama-cpp"]) == 0
    assert "0.3.35 (default)" in capsys.readouterr().out


def test_doctor_names_what_is_missing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["doctor"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.run(["doctor", "--json"]) == 3
    error = envelope(capsys)["errors"][0]
    assert "git" in error["message"]
    assert "apt-get install" in error["hint"]
    status = {f["name"].split()[0]: f["status"] for f in error["data"]["findings"]}
    assert status["cmake"] == "index"
    assert status["git"] == "missing"


def test_a_machine_without_git_is_told_so(cache: Path, tmp_path: Path) -> None:
    # In a process of its own: GitPython looks for git when it is first imported.
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "kvpatch", "doctor", "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "apt-get install git" in json.loads(done.stdout)["errors"][0]["hint"]
