"""From what the user asked to what will be done: a Plan names every source, patch, tool and flag, and nothing has run.

A Plan is built without touching a work tree. Everything that decides the result of a build is in it, so the keys of
the stages (see pipeline.py) are computed from it alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvpatch import __version__, hashing, paths, pins, toolchain
from kvpatch.errors import PatchError, SourceError, UsageError
from kvpatch.patching import Patch, load_series
from kvpatch.sources import LLAMA_CPP, OLLAMA, Pin, Progress, Resolved, Store
from kvpatch.sources.sdist import file_version as sdist_version
from kvpatch.sources.sdist import is_spec
from kvpatch.stages import output

BACKENDS = ("cpu", "cuda")
CUDA = "cuda"
# What CMake's CMAKE_CUDA_ARCHITECTURES takes.
_CUDA_ARCH = re.compile(r"\d{2,3}[af]?(-real|-virtual)?|native|all|all-major")
# How llama-cpp-python calls its versions; llama.cpp has no tag like that.
_SDIST_VERSION = re.compile(r"\d+\.\d+\.\d+\S*")
SDIST = "sdist"
STOCK = "stock"
Kind = Literal["ollama", "llama.cpp"]
PinStatus = Literal["pinned", "tag", "verified", "mismatch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked for. Neither `ollama` nor `llama_cpp`: the default release of Ollama. The CPU backend is
    always built; no `cuda_arch`: what upstream itself compiles for."""

    out: Path
    ollama: str | None = None
    llama_cpp: str | None = None
    ollama_source: str | None = None
    llama_cpp_source: str | None = None
    backend: tuple[str, ...] = ("cpu",)
    cuda_arch: tuple[str, ...] = ()
    stock: bool = False
    jobs: int | None = None
    cache: Path | None = None
    allow_pin_mismatch: bool = False
    compiler_cache: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One build, fully decided. `series_id`: eight hex digits that name the patches and all generated beside them.

    `pin_status` says how the llama.cpp relates to what is pinned: pinned (same commit or content), tag (the pinned tag,
    whose commit nobody recorded), verified (another one, listed as verified with the release), mismatch (accepted by
    --allow-pin-mismatch). The patches are in the order of their series; a stock build has none.
    """

    kind: Kind
    release: pins.OllamaRelease | None
    llama_cpp: Resolved
    ollama: Resolved | None
    llama_cpp_date: str
    pin_status: PinStatus
    warnings: tuple[str, ...]
    llama_cpp_patches: tuple[Patch, ...]
    ollama_patches: tuple[Patch, ...]
    series_id: str
    tools: tuple[toolchain.Tool, ...]
    backend: tuple[str, ...]
    cuda_arch: tuple[str, ...]
    stock: bool
    jobs: int
    out: Path
    data: Path
    cache: Path
    compiler_cache: toolchain.Tool | None

    @property
    def name(self) -> str:
        """Short name of what is built: ollama-v0.32.15, or llama.cpp-4df29be4f."""
        if self.release is not None:
            return f"ollama-{self.release.version}"
        return f"llama.cpp-{self.llama_cpp.ref}".replace("/", "-")

    @property
    def workspace(self) -> Path:
        """Trees, build folder, logs and state of this build.

        Named by the sources and not by the patches, so that a changed patch is an incremental build.
        """
        sources = [self.llama_cpp.key, self.ollama.key if self.ollama else None, self.backend]
        return self.cache / "work" / f"{self.name}-{hashing.of_value(sources)[:10]}"

    @property
    def label(self) -> str:
        """What was built, in words: release or llama.cpp commit, and our series."""
        what = self.name if self.stock else f"{self.name} (kvpatch {__version__}, series {self.series_id})"
        return (
            what
            if self.pin_status in ("pinned", "tag")
            else f"{what} with llama.cpp {self.llama_cpp.commit[:9]}"
        )

    def tool(self, name: str) -> toolchain.Tool:
        """The tool called `name`; planning made sure that it is there."""
        return next(tool for tool in self.tools if tool.name == name)

    @property
    def cuda(self) -> toolchain.Tool | None:
        """The compiler for CUDA when that backend is built."""
        return self.tool(toolchain.NVCC.name) if CUDA in self.backend else None

    def to_json(self) -> dict[str, Any]:
        """The plan for `--plan --json` and for the lock file: no path of this machine in what decides the result."""
        return {
            "kind": self.kind,
            "name": self.name,
            "release": self.release.version if self.release else None,
            "series": self.series_id,
            "pin_status": self.pin_status,
            "sources": [source_json(s) for s in (self.ollama, self.llama_cpp) if s is not None],
            "patches": {
                "ollama": patch_sums(self.ollama_patches),
                "llama.cpp": patch_sums(self.llama_cpp_patches),
            },
            "tools": {tool.name: tool.version for tool in self.tools},
            "backend": list(self.backend),
            **({"cuda_arch": list(self.cuda_arch)} if CUDA in self.backend else {}),
            "kvpatch": __version__,
        }


def source_json(source: Resolved) -> dict[str, Any]:
    """A source as manifest and lock show it: what it is, not where it lay."""
    return {
        "upstream": source.upstream,
        "kind": source.kind,
        "ref": source.ref,
        "commit": source.commit,
        "key": source.key,
    }


def _series_id(data: Path, *series: tuple[Patch, ...]) -> str:
    tops = ("templates", "vmm/src", "vmm/include", "go_shim")
    parts = [hashing.of_paths([data / top], data) for top in tops]
    return hashing.of_value([*(patch_sums(patches) for patches in series), parts])[:8]


def patch_sums(patches: tuple[Patch, ...]) -> dict[str, str]:
    """File name to sha256 of each patch."""
    return {patch.file.name: patch.sha256 for patch in patches}


def make(request: Request, *, progress: Progress) -> Plan:
    """Decide everything. Reads pins, series, sources (refs only) and tools.

    Raises UsageError, SourceError, ToolchainError or PatchError, before anything is built.
    """
    data = paths.data_dir()
    known = pins.load(data / "patches" / "pins.toml")
    cache = paths.cache_root(request.cache)
    store = Store(cache / "sources")
    _check(request)
    _check_llama_cpp(known, request)
    if request.llama_cpp is None and request.ollama_source is None:
        known.release(request.ollama or known.default_ollama)
    # Before anything is fetched: a missing compiler should not be found out after minutes of download.
    needed = toolchain.OLLAMA if request.llama_cpp is None else toolchain.LLAMA_CPP
    if CUDA in request.backend:
        needed = (*needed, toolchain.NVCC)
    tools = tuple(toolchain.ensure(requirement, cache / "tools", progress=progress) for requirement in needed)

    release = None
    ollama = None
    if request.llama_cpp is None:
        release = _release(known, store, request)
        pin = Pin(ref=release.version, commit=release.commit, date=release.date)
        ollama = store.resolve(OLLAMA, request.ollama_source, pin, progress=progress)
        llama_ref = release.llama_cpp
    else:
        llama_ref = request.llama_cpp
    llama_cpp = _llama_cpp(known, store, request, release, llama_ref, progress)
    if release is not None:
        assert ollama is not None
        status, warnings = _pin_status(release, llama_cpp, request)
        warnings = (*_ollama_pin(release, ollama, request), *warnings)
    else:
        status, warnings = ("pinned" if llama_cpp.verified else "tag"), ()
    date = known.llama_cpp_date(llama_cpp.ref) or known.llama_cpp_date(llama_cpp.commit) or llama_cpp.date
    if date is None:
        raise UsageError(
            f"the date of llama.cpp {llama_cpp.ref} is not known, so no patch can be chosen for it",
            hint="give a git repository with that commit by --llama-cpp-source, or `--llama-cpp-source sdist`",
        )

    plan = Plan(
        kind="ollama" if ollama is not None else "llama.cpp",
        release=release,
        llama_cpp=llama_cpp,
        ollama=ollama,
        llama_cpp_date=date,
        pin_status=status,
        warnings=warnings,
        llama_cpp_patches=(),
        ollama_patches=(),
        series_id=STOCK,
        tools=tools,
        backend=tuple(sorted({"cpu", *request.backend})),
        cuda_arch=tuple(dict.fromkeys(request.cuda_arch)),
        stock=request.stock,
        jobs=request.jobs or len(os.sched_getaffinity(0)),
        out=request.out.expanduser().absolute(),
        data=data,
        cache=cache,
        compiler_cache=toolchain.compiler_cache() if request.compiler_cache else None,
    )
    if plan.stock:
        return plan
    folder = data / "patches"
    ours = _select(folder / "llama.cpp", date, f"llama.cpp {llama_cpp.ref} ({date})")
    theirs: tuple[Patch, ...] = ()
    if release is not None:
        theirs = _select(folder / "ollama" / "llama-server", release.semver, f"Ollama {release.version}")
    return replace(
        plan, llama_cpp_patches=ours, ollama_patches=theirs, series_id=_series_id(data, ours, theirs)
    )


def _select(folder: Path, target: str, shown: str) -> tuple[Patch, ...]:
    # Without call sites it would be stock under another name; half of them (Ollama's alone) are worse than none.
    patches = load_series(folder).select(target)
    if not patches:
        raise PatchError(
            f"no patch in {folder} is for {shown}, so the build would not be elastic",
            hint="choose a release or llama.cpp that the series is for (`kvpatch versions`; for llama.cpp, "
            "`--llama-cpp-source sdist --allow-pin-mismatch`), or build it unpatched with --stock",
        )
    return patches


def _check(request: Request) -> None:
    if request.ollama is not None and request.llama_cpp is not None:
        raise UsageError(
            "--ollama and --llama-cpp name two different things to build",
            hint="for Ollama with another llama.cpp use --ollama with --llama-cpp-source",
        )
    if request.llama_cpp is not None and request.ollama_source is not None:
        raise UsageError("--ollama-source has no meaning with --llama-cpp", hint="leave --ollama-source out")
    for backend in request.backend:
        if backend not in BACKENDS:
            raise UsageError(
                f"backend {backend!r} cannot be built by this version of kvpatch; it builds: {', '.join(BACKENDS)}",
                hint="elastic memory is there for CUDA and for the CPU; leave --backend out for the latter",
            )
    if request.cuda_arch and CUDA not in request.backend:
        raise UsageError("--cuda-arch has no meaning without --backend cuda", hint="add --backend cuda")
    for arch in request.cuda_arch:
        if not _CUDA_ARCH.fullmatch(arch):
            raise UsageError(
                f"--cuda-arch {arch!r} is not an architecture",
                hint="give a compute capability without the point, once for each: --cuda-arch 90 --cuda-arch 120a",
            )
    output.check_replaceable(request.out.expanduser().absolute())
    if request.jobs is not None and request.jobs < 1:
        raise UsageError(
            f"--jobs {request.jobs}: at least 1 is needed", hint="leave --jobs out to use every core"
        )


def _check_llama_cpp(known: pins.Pins, request: Request) -> None:
    # Neither is anything that a git host could know: it is not asked.
    ref, source = request.llama_cpp or "", request.llama_cpp_source
    named = ref.partition(":")[2]
    if is_spec(ref) and named:
        version = sdist_version(named) or named
        raise UsageError(
            f"--llama-cpp {ref}: a source is named by --llama-cpp-source",
            hint=f"--llama-cpp {version}, or --llama-cpp {SDIST} --llama-cpp-source {ref}",
        )
    if _SDIST_VERSION.fullmatch(ref) and (source is None or is_spec(source)):
        known.sdist(ref)


def _release(known: pins.Pins, store: Store, request: Request) -> pins.OllamaRelease:
    wanted = request.ollama or known.default_ollama
    try:
        return known.release(wanted)
    except SourceError as error:
        if request.ollama_source is None:
            raise
        # The user has the repository at hand: say what it holds, not only what we know.
        tags = store.tags(OLLAMA, request.ollama_source)
        tag = wanted if wanted.startswith("v") else f"v{wanted}"
        there = (
            f"{request.ollama_source} has the tag"
            if tag in tags
            else f"{request.ollama_source} has no such tag"
        )
        stable = [t for t in tags if t.startswith("v") and "-" not in t]
        nearby = ", ".join(pins.nearest(tag, sorted(stable, key=pins.version_key)))
        raise SourceError(
            f"{error.message}; {there}" + (f" (nearest it has: {nearby})" if nearby else ""),
            hint=error.hint,
            data=error.data,
        ) from error


def _llama_cpp(
    known: pins.Pins,
    store: Store,
    request: Request,
    release: pins.OllamaRelease | None,
    ref: str,
    progress: Progress,
) -> Resolved:
    spec = request.llama_cpp_source
    held = [s for s in known.sdists if ref == s.version or pins.same_commit(s.commit, ref)]
    if spec is None and request.llama_cpp is not None and (held or ref == SDIST):
        spec = SDIST
    if spec is not None and spec.split(":", 1)[0] == SDIST:
        sdist = _sdist(known, release, held, spec.partition(":")[2])
        if request.llama_cpp is not None and ref != SDIST and sdist not in held:
            raise SourceError(
                f"llama.cpp {ref} is not what the source distribution {sdist.version} holds ({sdist.commit})",
                hint=f"--llama-cpp {sdist.commit}, or another --llama-cpp-source",
            )
        pin = Pin(
            ref=sdist.version, commit=sdist.commit, sha256=sdist.sha256, tree=sdist.tree, date=sdist.date
        )
        return store.resolve(LLAMA_CPP, spec, pin, progress=progress)
    commit = next((build.commit for build in known.llama_cpp if build.build == ref), None)
    return store.resolve(
        LLAMA_CPP, spec, Pin(ref=ref, commit=commit, date=known.llama_cpp_date(ref)), progress=progress
    )


def _sdist(
    known: pins.Pins, release: pins.OllamaRelease | None, held: list[pins.Sdist], named: str
) -> pins.Sdist:
    # `named` is a version, a file, or nothing. A file called otherwise is held against the one that fits.
    version = sdist_version(named) or ("" if "/" in named else named)
    if version:
        return known.sdist(version)
    if held:
        return held[0]
    verified = release.verified_with if release is not None else ()
    fitting = [s for s in known.sdists if any(pins.same_commit(s.commit, commit) for commit in verified)]
    return fitting[-1] if fitting else known.sdist()


def _ollama_pin(release: pins.OllamaRelease, ollama: Resolved, request: Request) -> tuple[str, ...]:
    # A folder, or an archive that does not say its commit, cannot be held against the release's commit.
    if ollama.verified or ollama.commit == release.commit:
        return ()
    text = (
        f"{ollama.location} ({ollama.kind}) does not tell its commit, so nothing shows that it is Ollama "
        f"{release.version} ({release.commit[:12]})"
    )
    if request.allow_pin_mismatch:
        return (f"{text}; it is taken as it is",)
    raise SourceError(
        text,
        hint="give a repository, or an archive made by `git archive`; or accept this one with --allow-pin-mismatch",
    )


def _pin_status(
    release: pins.OllamaRelease, llama_cpp: Resolved, request: Request
) -> tuple[PinStatus, tuple[str, ...]]:
    if llama_cpp.kind in ("git", "mirror") and llama_cpp.ref == release.llama_cpp:
        if llama_cpp.verified:
            return "pinned", ()
        return "tag", (
            f"llama.cpp {llama_cpp.ref} is commit {llama_cpp.commit} on the word of {llama_cpp.location} alone: "
            "patches/pins.toml has no commit for it (a lock file records it: --lock)",
        )
    shown = f"llama.cpp {llama_cpp.commit[:9]} ({llama_cpp.kind})"
    if any(pins.same_commit(llama_cpp.commit, commit) for commit in release.verified_with):
        return "verified", (
            f"{shown} is not {release.llama_cpp}, which Ollama {release.version} pins, but is verified with it",
        )
    if request.allow_pin_mismatch:
        return "mismatch", (
            f"{shown} is neither {release.llama_cpp}, which Ollama {release.version} pins, nor verified with it",
        )
    raise SourceError(
        f"{shown} is neither {release.llama_cpp}, which Ollama {release.version} pins, nor one verified with it"
        + (f" ({', '.join(release.verified_with)})" if release.verified_with else ""),
        hint="give the pinned llama.cpp by --llama-cpp-source, or accept this one with --allow-pin-mismatch",
    )
