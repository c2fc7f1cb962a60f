"""`cold_build`: what patching costs a build from nothing.

Both sides compile the same llama.cpp tree and the same release of Ollama, on warm sources and Go modules, without a
compiler cache and with an empty Go build cache; they alternate, so that a machine that grows slower hits both.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpatch import process
from kvpatch.errors import CompileError, UsageError
from kvpatch.events import Silent
from kvpatch.pipeline import run
from kvpatch.plan import STOCK, Plan
from kvpatch.stages import compile as compile_stage

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdBuild:
    """Wall seconds of each round. `upstream`: Ollama's documented CMake build of the unpatched tree. `patched`:
    `kvpatch compile` from warm sources to the output folder, every stage counted. `compile`: the
    compile stage of those alone."""

    upstream: tuple[float, ...]
    patched: tuple[float, ...]
    compile: tuple[float, ...]
    identical: tuple[str, ...]
    differing: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Median of patched over median of upstream."""
        return statistics.median(self.patched) / statistics.median(self.upstream)

    def to_json(self) -> dict[str, Any]:
        return {
            "upstream_seconds": list(self.upstream),
            "patched_seconds": list(self.patched),
            "compile_stage_seconds": list(self.compile),
            "ratio": self.ratio,
            "identical_artifacts": list(self.identical),
            "differing_artifacts": list(self.differing),
        }


def cold_build(plan: Plan, *, rounds: int, workdir: Path, progress: Progress) -> ColdBuild:
    """Build upstream and patched alternately, `rounds` times each, everything below `workdir`.

    Also compares the artifacts of the patched rounds byte by byte. Raises UsageError for a plan that is not Ollama, and
    whatever a stage raises.
    """
    if plan.ollama is None or plan.stock:
        raise UsageError(
            "the cold build is measured for a patched Ollama", hint="name a release with --ollama"
        )
    if rounds < 1:
        raise UsageError(f"--rounds {rounds}: at least 1 is needed")
    # Trees of its own, so that the user's workspace keeps its build folder.
    stock = replace(
        plan,
        stock=True,
        ollama_patches=(),
        series_id=STOCK,
        llama_cpp_patches=(),
        compiler_cache=None,
        cache=workdir / "upstream",
        out=workdir / "upstream-out",
    )
    patched = replace(plan, compiler_cache=None, cache=workdir / "patched", out=workdir / "patched-out")
    for side in (stock, patched):
        _share_sources(plan, side)
    progress("preparing upstream's trees")
    run(stock, Silent(), last="generate")
    upstream_seconds: list[float] = []
    patched_seconds: list[float] = []
    compile_seconds: list[float] = []
    sums: list[dict[str, str]] = []
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}: upstream's own build")
        upstream_seconds.append(_upstream(stock, workdir))
        progress(f"round {number} of {rounds}: {upstream_seconds[-1]:.1f} s; kvpatch")
        for leftover in ("work", "go-build"):
            shutil.rmtree(patched.cache / leftover, ignore_errors=True)
        began = time.monotonic()
        outcome = run(patched, Silent(), last="compile")
        patched_seconds.append(time.monotonic() - began)
        compile_seconds.append(next(seconds for name, _, seconds in outcome.stages if name == "compile"))
        progress(f"round {number} of {rounds}: {patched_seconds[-1]:.1f} s")
        sums.append({row["path"]: row.get("sha256", "") for row in outcome.values["compile"]["artifacts"]})
    names = sorted(set().union(*sums))
    same = [name for name in names if len({found.get(name) for found in sums}) == 1]
    return ColdBuild(
        upstream=tuple(upstream_seconds),
        patched=tuple(patched_seconds),
        compile=tuple(compile_seconds),
        identical=tuple(same) if rounds > 1 else (),
        differing=tuple(name for name in names if name not in same),
    )


def _share_sources(plan: Plan, side: Plan) -> None:
    side.cache.mkdir(parents=True, exist_ok=True)
    link = side.cache / "sources"
    if not link.exists():
        (plan.cache / "sources").mkdir(parents=True, exist_ok=True)
        link.symlink_to(plan.cache / "sources")


def _upstream(stock: Plan, workdir: Path) -> float:
    """Ollama's developer build (docs/development.md there) with a prepared llama.cpp; returns its wall seconds."""
    build = workdir / "upstream-build"
    go_cache = workdir / "upstream-go-build"
    for leftover in (build, go_cache):
        shutil.rmtree(leftover, ignore_errors=True)
    env = {**compile_stage.tool_environment(stock), "GOCACHE": str(go_cache)}
    log = workdir / "upstream.log"
    log.unlink(missing_ok=True)
    began = time.monotonic()
    try:
        process.run(compile_stage.configure_ollama(stock, build), env=env, log=log)
        for command in compile_stage.build_ollama(stock, build, stock.out):
            process.run(command, env=env, log=log)
    except process.ProcessFailure as failure:
        raise CompileError(
            f"upstream's own build failed:\n{failure.tail}", hint=f"its log is {log}"
        ) from failure
    return time.monotonic() - began
