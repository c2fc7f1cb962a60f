"""libkvcached as a file: how it is compiled, and where one that can be loaded lies.

A build of kvpatch has one beside llama-server. Without a build the library is compiled once into the cache, in a folder
named by everything that decides its bytes: the sources, the compiler and how it is called, the machine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kvpatch import generate, hashing, manifest, paths, process, toolchain
from kvpatch.errors import CompileError, LibraryError, UsageError, VerifyError, guard
from kvpatch.stages.output import MANIFEST

LIBRARY = "libkvcached.so"
FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", f"-Wl,-soname,{LIBRARY}")
# dlopen has a library of its own in a glibc before 2.34; with later ones, and with musl, this one is empty.
LINKED = ("-lpthread", "-ldl")
# Where builds have it, seen from their top; "" is the folder of a build that vmm/Makefile wrote to.
_PLACES = ("lib/ollama", "bin", "")

Progress = Callable[[str], None]


def compile_command(compiler: Path, sources: Path, target: Path) -> list[str | Path]:
    """The command that makes the library from `sources` (vmm/), which is to be its working folder.

    File names are relative to it, so that its own path stays out of the binary.
    """
    files = sorted(path.relative_to(sources).as_posix() for path in (sources / "src").glob("*.c"))
    return [compiler, *FLAGS, "-Iinclude", "-o", target, *files, *LINKED]


def key(data: Path) -> str:
    """sha256 of what the library is compiled from: vmm/src and vmm/include."""
    return hashing.of_paths([data / "vmm" / "src", data / "vmm" / "include"], data)


def find(build: Path | None = None, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The library of `build` (see `of_build`), else the one in the cache, compiled now if there is none.

    Raises UsageError or VerifyError for `build`; ToolchainError when there is no compiler and nothing was compiled
    before, CompileError when compiling fails, SourceError when the cache cannot be written.
    """
    return of_build(build) if build is not None else of_cache(paths.cache_root(cache), progress=progress)


def of_build(build: Path) -> Path:
    """The library of a build, given as its folder, as its kvpatch.json, or as the library itself.

    A file that a manifest lists must be the one it lists. Raises UsageError when there is no library, VerifyError when
    it is another one.
    """
    if build.name == MANIFEST:
        build = build.parent
    if build.is_file():
        return build.absolute()
    if (build / MANIFEST).is_file():
        for row in manifest.read(build)["artifacts"]:
            path = build / str(row["path"])
            if path.name != LIBRARY:
                continue
            if not path.is_file() or hashing.of_file(path) != row.get("sha256"):
                raise VerifyError(
                    f"{path} is not the library that {MANIFEST} lists",
                    hint=f"`kvpatch verify {build}` says what else is changed; build again",
                )
            return path.absolute()
        raise UsageError(
            f"the build in {build} has no {LIBRARY}: it is a stock build",
            hint="name a build with the elastic cache, or none",
        )
    for place in _PLACES:
        path = build / place / LIBRARY
        if path.is_file():
            return path.absolute()
    raise UsageError(
        f"{build} has no {LIBRARY}", hint="name a folder that `kvpatch build --out` wrote, or none"
    )


def of_cache(root: Path, *, progress: Progress | None = None) -> Path:
    """The library for the sources that this kvpatch carries, in the cache below `root`. Errors as `find`."""
    data = paths.data_dir()
    abi = generate.header_facts(data / "vmm" / "include" / "kvcached.h")["abi"]
    # Apart from the compiler, so that a library compiled before is still found where there is none now.
    sources = hashing.of_value([key(data), abi, FLAGS, LINKED, platform.machine(), platform.libc_ver()])
    folder = root / "vmm" / sources[:16]
    compiler, _ = toolchain.probe(toolchain.CC)
    if compiler is None:
        older = sorted(folder.glob(f"*/{LIBRARY}"), key=lambda path: path.stat().st_mtime_ns)
        if older:
            return older[-1]
        compiler = toolchain.ensure(toolchain.CC, root / "tools")
    identity = [str(compiler.path), str(compiler.path.resolve()), compiler.version]
    target = folder / hashing.of_value(identity)[:8] / LIBRARY
    if target.is_file():
        return target
    with guard(f"compile {LIBRARY}", target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / "lock"):
            if not target.is_file():
                if progress is not None:
                    progress(f"{LIBRARY}: compiling it with {compiler.path} {compiler.version}")
                _compile(compiler.path, data / "vmm", target)
    return target


def _compile(compiler: Path, sources: Path, target: Path) -> None:
    part = target.with_name(f".{LIBRARY}.{os.getpid()}.part")
    log = target.with_name("compile.log")
    log.unlink(missing_ok=True)
    try:
        process.run(compile_command(compiler, sources, part), cwd=sources, log=log, timeout=300)
        part.replace(target)
    except process.ProcessFailure as failure:
        raise CompileError(
            f"{LIBRARY} cannot be compiled from {sources}: {failure}",
            hint=f"the whole log is {log}; `kvpatch doctor` says which compiler is used",
        ) from failure
    finally:
        part.unlink(missing_ok=True)


def load_failure(path: Path, reason: str) -> LibraryError:
    """The error for a library that the system or this kvpatch cannot use."""
    return LibraryError(
        f"{path} cannot be used: {reason}",
        hint=f"take the {LIBRARY} of a build by this kvpatch; one in the cache may be deleted, it is compiled again",
    )
