"""What this machine has and lacks for each target, and which releases there is what for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvpatch import pins, toolchain
from kvpatch.errors import ToolchainError, UsageError
from kvpatch.patching import check_matches, load_series
from kvpatch.pools import config, errors, files

# Measured: workspace, build folder and output of one Ollama CPU build, plus its sources.
_NEEDED_BYTES = 4 * 10**9
_LEDGER_DIR = Path("/dev/shm")

Status = Literal["ok", "index", "missing", "optional", "wrong"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at. `status`: ok; index (kvpatch installs it from the package index when it is needed);
    missing (a build fails until `cure` is done); optional (missing, and only slower without); wrong (a server would
    not start with it)."""

    name: str
    status: Status
    found: str
    needed_for: str
    cure: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseRow:
    """A release, its pins, and how far it was verified. `patches` counts those that our series has for it."""

    version: str
    date: str
    profile: str
    llama_cpp: str
    verified_with: tuple[str, ...]
    patches: int
    status: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaCppRow:
    """A llama-cpp-python source distribution, the llama.cpp in it, and how far it was verified. `patches` counts those
    that our series has for it."""

    version: str
    date: str
    commit: str
    patches: int
    status: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(cache: Path) -> tuple[Finding, ...]:
    """Look at every tool, the cache, the place of the ledgers and those there are, the settings of `ollama serve`.
    Installs nothing."""
    findings = [_tool(requirement, cache / "tools") for requirement in toolchain.ALL]
    findings.append(_cache(cache))
    findings.append(_ledger())
    findings.extend(_ledger_file(file) for file in files.find())
    findings.extend(_config(file) for file in config.examine())
    return tuple(findings)


def require(findings: Sequence[Finding]) -> None:
    """Raise ToolchainError when something is missing that a build cannot do without, UsageError for settings that
    `ollama serve` would end with."""
    missing = [f for f in findings if f.status == "missing"]
    if missing:
        raise ToolchainError(
            "missing: " + "; ".join(f"{f.name} ({f.found}), needed for {f.needed_for}" for f in missing),
            hint=" && ".join(dict.fromkeys(f.cure for f in missing)),
            data={"findings": [f.to_json() for f in findings]},
        )
    wrong = [f for f in findings if f.status == "wrong"]
    if wrong:
        raise UsageError(
            "; ".join(f"{f.name}: {f.found}" for f in wrong),
            hint="; ".join(f.cure for f in wrong),
            data={"findings": [f.to_json() for f in findings]},
        )


def releases(known: pins.Pins, data: Path) -> tuple[ReleaseRow, ...]:
    """Every release that pins.toml lists, oldest first.

    Raises PatchFormatError for a malformed series, or a patch that none of what pins.toml lists would ever be given.
    """
    series = load_series(data / "patches" / "ollama" / "llama-server")
    check_matches(series, [release.semver for release in known.ollama])
    dates = [build.date for build in known.llama_cpp] + [sdist.date for sdist in known.sdists]
    check_matches(load_series(data / "patches" / "llama.cpp"), dates)
    return tuple(
        ReleaseRow(
            version=release.version,
            date=release.date,
            profile="llama-server",
            llama_cpp=release.llama_cpp,
            verified_with=release.verified_with,
            patches=len(series.select(release.semver)),
            status=release.status,
        )
        for release in known.ollama
    )


def llama_cpp(known: pins.Pins, data: Path) -> tuple[LlamaCppRow, ...]:
    """Every pinned source distribution of llama.cpp, oldest first."""
    series = load_series(data / "patches" / "llama.cpp")
    return tuple(
        LlamaCppRow(
            version=sdist.version,
            date=sdist.date,
            commit=sdist.commit,
            patches=len(series.select(sdist.date)),
            status=sdist.status,
        )
        for sdist in known.sdists
    )


def _tool(requirement: toolchain.Requirement, tools_dir: Path) -> Finding:
    tool, reason = toolchain.probe(requirement)
    tool = tool or toolchain.installed(requirement, tools_dir)
    name = f"{requirement.name} >= {requirement.minimum}"
    if tool is not None:
        where = f"{tool.version}, {tool.path}" + ("" if tool.origin == "PATH" else f" ({tool.origin})")
        return Finding(name=name, status="ok", found=where, needed_for=requirement.needed_for, cure="")
    status: Status = "optional" if requirement.optional else "index" if requirement.package else "missing"
    cure = "installed by itself when needed" if status == "index" else requirement.advice
    return Finding(name=name, status=status, found=reason, needed_for=requirement.needed_for, cure=cure)


def _cache(cache: Path) -> Finding:
    place = next(folder for folder in (cache, *cache.parents) if os.path.exists(folder))  # noqa: PTH110 - never raises
    free = shutil.disk_usage(place).free
    text = f"{cache}, {free / 1e9:.1f} GB free"
    if not os.access(place, os.W_OK):
        status: Status = "missing"
        cure, text = "choose another place with KVPATCH_CACHE", f"{place} is not writable"
    elif free < _NEEDED_BYTES:
        status, cure = "missing", f"free {_NEEDED_BYTES / 1e9:.0f} GB, or set KVPATCH_CACHE to a larger disk"
    else:
        status, cure = "ok", ""
    return Finding(name="cache folder", status=status, found=text, needed_for="sources and builds", cure=cure)


def _ledger() -> Finding:
    usable = _LEDGER_DIR.is_dir() and os.access(_LEDGER_DIR, os.W_OK)
    return Finding(
        name="shared memory",
        status="ok" if usable else "missing",
        found=f"{_LEDGER_DIR}, {shutil.disk_usage(_LEDGER_DIR).free / 1e6:.0f} MB free"
        if usable
        else f"no writable {_LEDGER_DIR}",
        needed_for="the ledger of a running elastic server",
        cure="" if usable else "mount a tmpfs at /dev/shm",
    )


def _ledger_file(file: files.LedgerFile) -> Finding:
    owner = errors.user_name(file.owner)
    return Finding(
        name=f"ledger of {file.device}",
        status="ok",
        found=f"{file.path}, of {owner}" + (" (this user)" if file.ours else ""),
        needed_for="kvpatch top, limit, trim, sleep, wake",
        cure="" if file.ours else errors.as_user(file.owner, "top"),
    )


def _config(file: config.ConfigFile) -> Finding:
    status: Status = "ok" if file.exists else "optional"
    cure = ""
    if file.problems:
        status, found = "wrong", f"{file.path}: {'; '.join(file.problems)}"
        cure = f"correct {file.path}: `ollama serve` ends with it"
    elif not file.path:
        found = "none: HOME is not set"
    elif not file.readable:
        found = f"{file.path}, which this user may not read"
        cure = "run this as its owner, to have it checked"
    elif not file.exists:
        found = f"{file.path}, not there: defaults, and OLLAMA_KVCACHED_* in the server's environment"
    else:
        found = f"{file.path}: {', '.join(file.settings) or 'no settings of kvcached'}"
    return Finding(name="config.yaml", status=status, found=found, needed_for=file.reader, cure=cure)
