"""`kvpatch bench switch|capacity` of builds that hold Ollama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpatch.bench import device as devices
from kvpatch.bench import models, ollama_capacity, ollama_models, ollama_servers, ollama_switch
from kvpatch.bench.figures import Report
from kvpatch.errors import UsageError
from kvpatch.smoke.report import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A benchmark: its plans, and what runs one."""

    full: Any
    short: Any
    run: Callable[[ollama_servers.Setup, Any, Progress], Report]


SWITCH = Level(full=ollama_switch.Plan(), short=ollama_switch.SHORT, run=ollama_switch.run)
CAPACITY = Level(full=ollama_capacity.Plan(), short=ollama_capacity.SHORT, run=ollama_capacity.run)


def holds_ollama(*builds: Path) -> bool:
    """Whether one of these folders is a build of Ollama; two of a kind are asked for later."""
    return any((build / "bin" / "ollama").is_file() for build in builds)


def setup(
    plan: Any,
    *,
    stock: Path,
    patched: Path,
    model: Path | None,
    shape: str,
    device: str,
    threads: int,
    work: Path,
    cache: Path | None,
    progress: Progress,
) -> ollama_servers.Setup:
    """All that a benchmark needs; writes the models that are not there yet."""
    if model is not None:
        raise UsageError(
            "--model cannot be given with builds of Ollama: several models of one shape are written",
            hint="use --shape",
        )
    stock_install, patched_install, facts = ollama_servers.installs(stock, patched)
    on = devices.of_name(device)
    wanted = models.shape_named(shape)
    progress(f"{plan.models} models of shape {wanted.name}")
    store = ollama_models.store(
        ollama_models.folder(wanted, cache),
        wanted,
        plan.models,
        bases=models.folder(cache),
    )
    return ollama_servers.Setup(
        stock=stock_install,
        patched=patched_install,
        store=store,
        device=on,
        work=work,
        budget=plan.leave,
        threads=threads,
        batch=plan.batch,
        facts={
            "builds": facts,
            "model": f"{plan.models} of shape {wanted.name}, Q4_0",
            "model_bytes": store.members[0].bytes,
            "budget": plan.leave,
            "on": on.name,
            **on.facts(),
        },
    )
