"""The stages in order, and when each one has to run.

The key of a stage is the sha256 of everything its result depends on, the key of the stage before it included, and is
computed from the plan alone. A stage whose recorded key is the same, and whose products are still there, is fresh.
When anything up to compile has to run, the source stages run too: they are idempotent, and they guarantee that the
trees are in the state that the key speaks of. Stock and patched builds share the trees, so what stands in them is
recorded apart from what each variant has done.
"""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvpatch import __version__, hashing, manifest, paths
from kvpatch.errors import (
    CompileError,
    GenerateError,
    KvpatchError,
    PatchError,
    SmokeError,
    SourceError,
    UsageError,
)
from kvpatch.events import Events
from kvpatch.plan import Plan, patch_sums
from kvpatch.stages import apply, compile, fetch, generate, output, smoke
from kvpatch.stages.context import Context, Value

_STATE_SCHEMA = 1
_LOCK_SECONDS = 3600.0
# What a machine answers when it has no room or gives no permission; any other OSError is a fault of ours.
_REFUSALS = frozenset(
    {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A step of the build. `own` gives the inputs it adds to those of the stages before it; `error` is raised when
    the disk is full or something may not be written."""

    name: str
    run: Callable[[Context], Value]
    own: Callable[[Context], Any]
    error: type[KvpatchError] = KvpatchError
    fresh: Callable[[Context, Value], bool] = lambda context, value: True


def _run_manifest(context: Context) -> Value:
    return {"path": str(_write_manifest(context, context.plan.out))}


def _write_manifest(context: Context, folder: Path) -> Path:
    built = manifest.build(context.plan, context.values, compile.inputs(context))
    return manifest.write(built, folder)


def _run_compile(context: Context) -> Value:
    value = compile.run(context)
    # Written before anything is put in `out`, without smoke: whatever comes next, `out` says what it is.
    context.values["compile"] = value
    _write_manifest(context, context.staging_dir)
    output.replace(context.staging_dir, context.plan.out)
    return value


STAGES = (
    Stage(
        name="fetch",
        run=fetch.run,
        own=lambda c: [s.key for s in (c.plan.ollama, c.plan.llama_cpp) if s is not None],
        error=SourceError,
    ),
    Stage(
        name="apply",
        run=apply.run,
        own=lambda c: [patch_sums(c.plan.ollama_patches), patch_sums(c.plan.llama_cpp_patches)],
        error=PatchError,
    ),
    Stage(
        name="generate",
        run=generate.run,
        own=lambda c: [c.plan.series_id, generate.template_context(c)],
        error=GenerateError,
    ),
    Stage(
        name="compile",
        run=_run_compile,
        own=lambda c: [compile.inputs(c), None if c.plan.stock else compile.library_key(c)],
        error=CompileError,
        fresh=compile.fresh,
    ),
    Stage(name="smoke", run=smoke.run, own=lambda c: __version__, error=SmokeError),
    Stage(
        name="manifest",
        run=_run_manifest,
        own=lambda c: None,
        error=CompileError,
        fresh=lambda c, v: (c.plan.out / output.MANIFEST).is_file(),
    ),
)
NAMES = tuple(stage.name for stage in STAGES)
_SOURCE_STAGES = ("fetch", "apply", "generate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run did: for each stage its status ("done" or "fresh") and seconds, and the values of all stages."""

    stages: tuple[tuple[str, str, float], ...]
    values: dict[str, Value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A line of `--plan`: a stage, its key, and whether it would run."""

    stage: str
    key: str
    fresh: bool


def steps(
    plan: Plan, events: Events, *, first: str | None = None, last: str | None = None
) -> tuple[Step, ...]:
    """What `run` would do with the same arguments, in order. Nothing is run or written."""
    context = Context(plan=plan, events=events)
    keys = _keys(context)
    state = _State.load(plan)
    due = _due(context, keys, state, first, last)
    return tuple(Step(stage=s.name, key=keys[s.name], fresh=s.name not in due) for s in _selected(last))


def run(plan: Plan, events: Events, *, first: str | None = None, last: str | None = None) -> Outcome:
    """Run the stages up to `last`. With `first`, that stage and all after it run even when they are fresh, and those
    before it must be fresh.

    Raises whatever a stage raises; stages that finished are remembered, so that the next run goes on from there.
    """
    done: list[tuple[str, str, float]] = []
    with _locked(plan, events):
        context = Context(plan=plan, events=events)
        keys = _keys(context)
        state = _State.load(plan)
        due = _due(context, keys, state, first, last)
        if "compile" in due:
            output.prepare(plan.out)
        for stage in _selected(last):
            began = time.monotonic()
            if stage.name not in due:
                context.values[stage.name] = state.value(stage.name)
                events.stage_finished(stage.name, "fresh", 0.0)
                done.append((stage.name, "fresh", 0.0))
                continue
            events.stage_started(stage.name)
            try:
                _execute(stage, context, state, keys[stage.name])
            except BaseException:
                events.stage_finished(stage.name, "failed", time.monotonic() - began)
                raise
            seconds = time.monotonic() - began
            events.stage_finished(stage.name, "done", seconds)
            done.append((stage.name, "done", seconds))
    return Outcome(stages=tuple(done), values=dict(context.values))


def _execute(stage: Stage, context: Context, state: _State, key: str) -> None:
    began = time.monotonic()
    try:
        context.log(stage.name).unlink(missing_ok=True)
        # Until it has finished, neither this stage nor what was made from it counts as done.
        state.forget(NAMES[NAMES.index(stage.name) :])
        trees = _Trees(context.plan)
        if stage.name in _SOURCE_STAGES:
            trees.forget()
        value = stage.run(context)
        context.values[stage.name] = value
        if stage.name in _SOURCE_STAGES:
            trees.record(stage.name, key)
        state.record(stage.name, key, value, time.monotonic() - began)
    except KvpatchError as error:
        with contextlib.suppress(OSError):
            context.write_log(stage.name, f"error: {error.message}")
        raise
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise stage.error(
            f"stage {stage.name}: {error.strerror}: {error.filename or context.plan.workspace}",
            hint="free space or mend the permissions, or choose another place with --cache-dir or --out",
        ) from error


def _selected(last: str | None) -> tuple[Stage, ...]:
    return STAGES if last is None else STAGES[: _index(last, "--until") + 1]


def check_names(first: str | None, last: str | None) -> None:
    """Raise UsageError for a --from or --until that names no stage, before anything is looked at."""
    for name, option in ((first, "--from"), (last, "--until")):
        if name is not None:
            _index(name, option)


def _index(name: str, option: str) -> int:
    if name not in NAMES:
        raise UsageError(f"{option} {name}: no such stage", hint=f"stages in order: {', '.join(NAMES)}")
    return NAMES.index(name)


def _keys(context: Context) -> dict[str, str]:
    keys: dict[str, str] = {}
    previous = hashing.of_value([_STATE_SCHEMA, context.plan.stock])
    for stage in STAGES:
        previous = hashing.of_value([previous, stage.name, stage.own(context)])
        keys[stage.name] = previous
    return keys


def _due(
    context: Context, keys: dict[str, str], state: _State, first: str | None, last: str | None
) -> frozenset[str]:
    selected = [stage.name for stage in _selected(last)]
    stale = {
        stage.name
        for stage in _selected(last)
        if state.key(stage.name) != keys[stage.name] or not stage.fresh(context, state.value(stage.name))
    }
    # A build whose binaries are there needs no trees; whoever asked for the trees, or compiles from them, does.
    if last in _SOURCE_STAGES if first is None else first in (*_SOURCE_STAGES, "compile"):
        lost = set(_SOURCE_STAGES) - _Trees(context.plan).holding(keys)
        stale |= lost.intersection(selected)
    if first is not None:
        start = _index(first, "--from")
        if first not in selected:
            raise UsageError(
                f"--from {first} lies after --until {last}", hint=f"stages in order: {', '.join(NAMES)}"
            )
        if first == "apply":
            start = 0  # It works on upstream's trees, so they are laid out first.
        early = [name for name in selected[:start] if name in stale]
        if early:
            raise UsageError(
                f"--from {first} needs the stages before it, but {early[0]} has not run with these inputs, "
                "or another build has used the trees since",
                hint="leave --from out: stages with nothing to do are skipped by themselves",
            )
        return frozenset(selected[start:])
    if not stale:
        return frozenset()
    start = min(NAMES.index(name) for name in stale)
    if start <= NAMES.index("compile"):
        start = 0
    return frozenset(selected[start:])


class _State:
    """What has been done in a workspace for one variant and one output folder, on disk after every stage."""

    def __init__(self, path: Path, stages: dict[str, dict[str, Any]]) -> None:
        self._path = path
        self._stages = stages

    @classmethod
    def load(cls, plan: Plan) -> _State:
        variant = hashing.of_value([plan.stock, str(plan.out)])[:12]
        path = plan.workspace / f"state-{variant}.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            stages = raw["stages"] if raw["schema"] == _STATE_SCHEMA else {}
        except (OSError, ValueError, KeyError, TypeError):
            # Absent, or torn by a crash of the machine: then nothing is known and everything is done again.
            stages = {}
        return cls(path, stages)

    def key(self, name: str) -> str | None:
        entry = self._stages.get(name)
        return None if entry is None else str(entry["key"])

    def value(self, name: str) -> Value:
        value: Value = self._stages[name]["value"]
        return value

    def forget(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._stages.pop(name, None)
        self._save()

    def record(self, name: str, key: str, value: Value, seconds: float) -> None:
        self._stages[name] = {"key": key, "seconds": round(seconds, 3), "value": value}
        self._save()

    def _save(self) -> None:
        paths.write_whole(self._path, json.dumps({"schema": _STATE_SCHEMA, "stages": self._stages}, indent=1))


class _Trees:
    """Which source stage, with which key, the trees of a workspace are the result of."""

    def __init__(self, plan: Plan) -> None:
        self._path = plan.workspace / "trees.json"

    def holding(self, keys: dict[str, str]) -> frozenset[str]:
        """The source stages that need not run for the trees to be what these keys say."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            stage, key = found["stage"], found["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return frozenset()
        if stage not in _SOURCE_STAGES or keys[stage] != key:
            return frozenset()
        return frozenset(_SOURCE_STAGES[: _SOURCE_STAGES.index(stage) + 1])

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)

    def record(self, stage: str, key: str) -> None:
        paths.write_whole(self._path, json.dumps({"stage": stage, "key": key}))


@contextlib.contextmanager
def _locked(plan: Plan, events: Events) -> Iterator[None]:
    # One build of a workspace at a time: the second waits, and then mostly finds everything fresh.
    stack = contextlib.ExitStack()
    try:
        plan.workspace.mkdir(parents=True, exist_ok=True)
        # Two workspaces may be told to write to the same folder, so that has a lock too; always in this order.
        outs = plan.cache / "locks"
        outs.mkdir(parents=True, exist_ok=True)
        locks = [
            FileLock(plan.workspace / "lock"),
            FileLock(outs / f"{hashing.of_value(str(plan.out))[:12]}.lock"),
        ]
        for lock, busy in zip(locks, (plan.workspace, plan.out), strict=True):
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                events.warning(f"another build is at work in {busy}; waiting for it")
                stack.enter_context(lock.acquire(timeout=_LOCK_SECONDS))
    except Timeout as error:
        stack.close()
        raise UsageError(
            f"another build holds {error.lock_file} for over {_LOCK_SECONDS / 60:.0f} minutes",
            hint="wait, or end it",
        ) from error
    except OSError as error:
        stack.close()
        raise SourceError(
            f"cannot write to the cache {plan.workspace}: {error.strerror or error}",
            hint="choose another place with --cache-dir or KVPATCH_CACHE",
        ) from error
    with stack:
        yield
