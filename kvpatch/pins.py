"""patches/pins.toml as values: the releases kvpatch knows and what each is pinned to."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from kvpatch.errors import KvpatchError, SourceError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class OllamaRelease:
    """One release of Ollama: `commit` is the full id of its tag, `llama_cpp` the build it pins itself."""

    version: str
    commit: str
    date: str
    llama_cpp: str
    verified_with: tuple[str, ...]
    status: str

    @property
    def semver(self) -> str:
        """The version without the leading v, as the linker flag and patch ranges want it."""
        return self.version.removeprefix("v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sdist:
    """A llama-cpp-python source distribution: the llama.cpp commit in its vendor folder, and that folder's git tree."""

    version: str
    sha256: str
    commit: str
    tree: str
    date: str
    status: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaCppBuild:
    """One upstream build tag of llama.cpp: its date (YYYY-MM-DD), which patch ranges compare with, and its commit, None
    where nobody has recorded it yet."""

    build: str
    date: str
    commit: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pins:
    """The whole file."""

    default_ollama: str
    default_sdist: str
    ollama: tuple[OllamaRelease, ...]
    sdists: tuple[Sdist, ...]
    llama_cpp: tuple[LlamaCppBuild, ...]

    def release(self, version: str) -> OllamaRelease:
        """The release called `version` (v0.32.15 or 0.32.15). Raises SourceError naming what is known."""
        wanted = version if version.startswith("v") else f"v{version}"
        for release in self.ollama:
            if release.version == wanted:
                return release
        known = [release.version for release in self.ollama]
        raise SourceError(
            f"Ollama {wanted} is not a release this kvpatch knows; it knows {len(known)}: {known[0]} .. {known[-1]}",
            hint=f"`kvpatch versions` lists them; nearest: {', '.join(nearest(wanted, known))}",
            data={"version": wanted, "known": known},
        )

    def sdist(self, version: str | None = None) -> Sdist:
        """The source distribution `version` (default: the pinned default). Raises UsageError naming those known."""
        wanted = version or self.default_sdist
        for sdist in self.sdists:
            if sdist.version == wanted:
                return sdist
        raise UsageError(
            f"llama-cpp-python {wanted} is not pinned in patches/pins.toml",
            hint=f"pinned: {', '.join(s.version for s in self.sdists)} (`kvpatch versions --llama-cpp`)",
        )

    def llama_cpp_date(self, ref: str) -> str | None:
        """The date of a build tag or commit prefix that the file lists, else None."""
        for build in self.llama_cpp:
            if build.build == ref:
                return build.date
        for sdist in self.sdists:
            if same_commit(ref, sdist.commit):
                return sdist.date
        return None


def same_commit(one: str, other: str) -> bool:
    """Whether two commit ids, either of them shortened to no less than nine digits, name one commit."""
    shorter = min(len(one), len(other))
    return shorter >= 9 and one[:shorter] == other[:shorter]


def version_key(tag: str) -> Version:
    """Sorts tags as versions; what is no version comes first."""
    try:
        return Version(tag)
    except InvalidVersion:
        return Version("0")


def nearest(wanted: str, known: list[str], count: int = 3) -> list[str]:
    """The `count` versions of `known` that lie closest to `wanted`, in order; the newest when it is no version."""
    try:
        target = Version(wanted)
    except InvalidVersion:
        return known[-count:]
    below = [v for v in known if Version(v) <= target]
    above = [v for v in known if Version(v) > target]
    picked = (below[-count:] + above[:count]) if below and above else (below[-count:] or above[:count])
    return picked[-count:]


def load(path: Path) -> Pins:
    """Read `path`. Raises KvpatchError when it is malformed: it is ours, so that is a fault of the installation."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise KvpatchError(f"{path}: schema {raw['schema']} is not {SCHEMA}, the one this kvpatch reads")
        return Pins(
            default_ollama=raw["defaults"]["ollama"],
            default_sdist=raw["defaults"]["sdist"],
            ollama=tuple(
                OllamaRelease(
                    version=row["version"],
                    commit=row["commit"],
                    date=row["date"],
                    llama_cpp=row["llama_cpp"],
                    verified_with=tuple(row.get("verified_with", ())),
                    status=row["status"],
                )
                for row in raw["ollama"]
            ),
            sdists=tuple(Sdist(**row) for row in raw["sdist"]),
            llama_cpp=tuple(LlamaCppBuild(**row) for row in raw["llama_cpp"]),
        )
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise KvpatchError(
            f"{path} cannot be read: {error!r}", hint="restore it from the release of kvpatch"
        ) from error
