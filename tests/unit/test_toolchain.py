"""Finding programs: PATH first, versions checked, the package index as the way out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from kvpatch import process, toolchain
from kvpatch.errors import ToolchainError

TOOL = toolchain.Requirement(
    name="frob",
    candidates=("frob", "frob-ng"),
    version_args=("--version",),
    minimum="2.5",
    needed_for="frobbing",
    advice="pip install frob-bin",
    package="frob-bin",
    inside="frob/bin/frob",
)


def program(path: Path, prints: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{prints}'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_path_comes_first(on_path: Path, tmp_path: Path) -> None:
    program(on_path / "frob", "frob version 2.10.1 (somewhere)")
    tool = toolchain.ensure(TOOL, tmp_path / "tools")
    assert (tool.version, tool.origin, tool.path) == ("2.10.1", "PATH", on_path / "frob")


def test_a_second_name_is_tried_when_the_first_is_too_old(on_path: Path, tmp_path: Path) -> None:
    program(on_path / "frob", "2.4")
    program(on_path / "frob-ng", "frob go2.6")
    assert toolchain.ensure(TOOL, tmp_path).path == on_path / "frob-ng"


def test_why_nothing_on_path_was_good_enough(on_path: Path) -> None:
    program(on_path / "frob", "2.4")
    program(on_path / "frob-ng", "no number")
    tool, reason = toolchain.probe(TOOL)
    assert tool is None
    assert "is 2.4, older than 2.5" in reason
    assert "does not tell its version" in reason


def test_an_old_tool_is_replaced_from_the_package_index_once(
    on_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(on_path / "frob", "2.4")
    calls: list[list[str]] = []
    real = process.run

    def pip(argv: list[object], **kwargs: object) -> process.Completed:
        words = [str(word) for word in argv]
        if "pip" not in words:
            return real(argv, **kwargs)  # type: ignore[arg-type]
        calls.append(words)
        program(Path(words[words.index("--target") + 1]) / "frob" / "bin" / "frob", "2.7")
        return process.Completed(argv=tuple(words), returncode=0, stdout="")

    monkeypatch.setattr(process, "run", pip)
    said: list[str] = []
    first = toolchain.ensure(TOOL, tmp_path / "tools", progress=said.append)
    second = toolchain.ensure(TOOL, tmp_path / "tools")
    assert first == second
    assert first.version == "2.7"
    assert first.origin == "frob-bin (package index)"
    assert len(calls) == 1
    assert calls[0][:3] == [sys.executable, "-m", "pip"]
    assert said == ["frob: installing frob-bin from the package index"]


def test_a_failed_install_says_why_and_what_to_do(
    on_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(argv: list[str], **kwargs: object) -> process.Completed:
        raise process.ProcessFailure(argv, 1, "no matching distribution", None)

    monkeypatch.setattr(process, "run", pip)
    with pytest.raises(ToolchainError, match="no matching distribution") as caught:
        toolchain.ensure(TOOL, tmp_path / "tools")
    assert caught.value.exit_code == 3
    assert caught.value.hint == "pip install frob-bin"
    assert not (tmp_path / "tools" / "frob-bin").exists()


def test_a_tool_without_a_wheel_gives_advice(on_path: Path, tmp_path: Path) -> None:
    requirement = toolchain.Requirement(
        name="cc",
        candidates=("no-such-cc",),
        version_args=("-v",),
        minimum="1",
        needed_for="C",
        advice="apt-get install gcc",
    )
    with pytest.raises(ToolchainError, match="none of no-such-cc is on PATH") as caught:
        toolchain.ensure(requirement, tmp_path)
    assert caught.value.hint == "apt-get install gcc"


@pytest.mark.parametrize("requirement", [toolchain.GIT, toolchain.CC, toolchain.CXX], ids=lambda r: r.name)
def test_the_real_tools_tell_their_version(requirement: toolchain.Requirement) -> None:
    tool, reason = toolchain.probe(requirement)
    assert tool is not None, reason


def test_nvcc_tells_its_version_in_a_line_with_years_and_companies(on_path: Path) -> None:
    nvcc = dataclasses.replace(toolchain.NVCC, candidates=("nvcc",))
    told = "Copyright (c) 2005-2025 NVIDIA Corporation\\nCuda compilation tools, release 12.8, V12.8.93"
    program(on_path / "nvcc", told)
    tool, reason = toolchain.probe(nvcc)
    assert tool is not None, reason
    assert tool.version == "12.8"
    program(on_path / "nvcc", told.replace("12.8", "11.8"))
    assert toolchain.probe(nvcc) == (None, f"{on_path / 'nvcc'} is 11.8, older than 12")


def test_a_missing_cuda_toolkit_is_not_installed_but_explained(on_path: Path, tmp_path: Path) -> None:
    nvcc = dataclasses.replace(toolchain.NVCC, candidates=("nvcc",))
    with pytest.raises(ToolchainError, match="nvcc >= 12 is needed for --backend cuda") as caught:
        toolchain.ensure(nvcc, tmp_path / "tools")
    assert caught.value.exit_code == 3
    assert caught.value.hint is not None
    assert "CUDA toolkit" in caught.value.hint
    assert not (tmp_path / "tools").exists()
