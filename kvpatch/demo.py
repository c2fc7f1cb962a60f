"""The demonstration: a stock and a patched llama-server run the same requests, and what their caches take is
read at the same moments. Every figure is measured; nothing is computed from what ought to be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpatch.errors import SmokeError
from kvpatch.smoke import models, smaps
from kvpatch.smoke.install import Install
from kvpatch.smoke.llama import (
    OFF,
    ON,
    Ask,
    Config,
    Elastic,
    complete,
    erase,
    first_difference,
    ledger_path,
    sample,
    server_spec,
)
from kvpatch.smoke.report import CheckFailed, Progress
from kvpatch.smoke.server import Server, serve

CELLS = 32768
_SHORT = Ask(prompt=100, answer=64)
_LONG = Ask(prompt=4000, answer=64, salt=1)
START, AFTER_SHORT, AFTER_LONG, RELEASED = (
    "start",
    "after a short prompt",
    "after a long prompt",
    "after release",
)
MOMENTS = (START, AFTER_SHORT, AFTER_LONG, RELEASED)
_RELEASE_SECONDS = 1.0
_POLL_SECONDS = 0.02
_KV_SIZE = re.compile(r"llama_kv_cache: size =\s*([0-9.]+) MiB")
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRow:
    """Bytes at a moment. `*_reserved`: address space of the key-value cache; `*_mapped`: of it, what physical
    memory is taken for; `*_resident`: anonymous memory of the whole process, as the kernel counts it.
    `tokens_equal`: of the answer that belongs to the moment (None: there is none)."""

    moment: str
    stock_reserved: int
    stock_mapped: int
    stock_resident: int
    elastic_reserved: int
    elastic_mapped: int
    elastic_resident: int
    tokens_equal: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What both servers showed. `problems` is empty when all is as promised; `tokens` were compared one by one;
    `release_seconds` is from the answer to the release until the mapped bytes were seen to have fallen."""

    model: str
    cells: int
    rows: tuple[DemoRow, ...]
    tokens: int
    distinct: int
    tokens_equal: bool
    release_seconds: float
    seconds: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"schema": "kvpatch.demo/1", "ok": self.ok, **asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    reserved: int
    mapped: int
    resident: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Life:
    readings: dict[str, _Reading]
    answers: dict[str, tuple[int, ...]]
    release_seconds: float


def run(build: Callable[[bool], Install], *, workdir: Path, progress: Progress | None = None) -> DemoReport:
    """Run both servers, one after the other, on a tiny model with a long context. `build` gives the install:
    without patches for True, patched for False.

    Raises SmokeError when a server does not run, or its figures cannot be trusted (log and kernel disagree).
    """
    stock, patched = build(True), build(False)
    begin = time.monotonic()
    folder = workdir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda text: None)
    if not patched.patched:
        raise SmokeError(f"{patched.library} is missing: this is not a patched build", hint="build it again")
    say("writing the tiny model")
    model = models.tiny_llama(folder / "demo.gguf", 1)
    config = Config(name="demo", model=model, flash=True, cells=CELLS)
    try:
        ordinary = _live(stock, config, OFF, folder, "stock", say)
        elastic = _live(patched, config, ON, folder, "elastic", say)
    except CheckFailed as failure:
        raise SmokeError(
            f"the demonstration did not run: {failure.detail}",
            hint=f"read the servers' logs in {folder}",
            data={"logs": failure.logs},
        ) from failure
    rows = tuple(_row(moment, ordinary, elastic) for moment in MOMENTS)
    return DemoReport(
        model=f"{model.shape.arch}, {model.shape.layers} layers, {model.path.stat().st_size} bytes",
        cells=CELLS,
        rows=rows,
        tokens=sum(len(tokens) for tokens in ordinary.answers.values()),
        distinct=min(len(set(tokens)) for tokens in ordinary.answers.values()),
        tokens_equal=all(row.tokens_equal is not False for row in rows),
        release_seconds=round(elastic.release_seconds, 3),
        seconds=round(time.monotonic() - begin, 3),
        problems=_problems(rows, elastic.release_seconds),
    )


def _row(moment: str, ordinary: _Life, elastic: _Life) -> DemoRow:
    stock, ours = ordinary.readings[moment], elastic.readings[moment]
    equal = None
    if moment in ordinary.answers:
        equal = first_difference(ordinary.answers[moment], elastic.answers[moment]) is None
    return DemoRow(
        moment=moment,
        stock_reserved=stock.reserved,
        stock_mapped=stock.mapped,
        stock_resident=stock.resident,
        elastic_reserved=ours.reserved,
        elastic_mapped=ours.mapped,
        elastic_resident=ours.resident,
        tokens_equal=equal,
    )


def _problems(rows: Sequence[DemoRow], release_seconds: float) -> tuple[str, ...]:
    """What is not as promised, in words."""
    found = [f"{row.moment}, the tokens differ" for row in rows if row.tokens_equal is False]
    if all(row.tokens_equal is None for row in rows):
        found.append("no tokens were compared")
    start, short, long, released = (row.elastic_mapped for row in rows)
    if not start < rows[0].elastic_reserved // 10:
        found.append(f"{start} of {rows[0].elastic_reserved} bytes are mapped at start")
    if not start < short < long:
        found.append(f"mapped bytes do not grow with the prompts: {start}, {short}, {long}")
    if not _fallen(released, long):
        found.append(f"{released} of {long} mapped bytes are left {_RELEASE_SECONDS:g} s after release")
    elif release_seconds > _RELEASE_SECONDS:
        found.append(
            f"the mapped bytes fell {release_seconds:.2f} s after release, {_RELEASE_SECONDS:g} s is promised"
        )
    return tuple(found)


def _fallen(released: int, before: int) -> bool:
    return released < before // 2


def _live(
    install: Install, config: Config, elastic: Elastic, folder: Path, name: str, say: Progress
) -> _Life:
    readings: dict[str, _Reading] = {}
    answers: dict[str, tuple[int, ...]] = {}
    with serve(server_spec(install, config, elastic, folder), folder) as server:
        say(f"{name}: server started")
        readings[START] = _read(server, install, config, elastic, folder)
        for moment, ask in ((AFTER_SHORT, _SHORT), (AFTER_LONG, _LONG)):
            answers[moment] = complete(server, ask).tokens
            readings[moment] = _read(server, install, config, elastic, folder)
            say(f"{name}: {moment}")
        erase(server)
        begin = time.monotonic()
        released = _read(server, install, config, elastic, folder)
        seconds = time.monotonic() - begin
        while elastic.on and released.mapped and time.monotonic() - begin < _RELEASE_SECONDS:
            fallen = _fallen(released.mapped, readings[AFTER_LONG].mapped)
            time.sleep(_POLL_SECONDS)
            released = _read(server, install, config, elastic, folder)
            if not fallen:
                seconds = time.monotonic() - begin
        readings[RELEASED] = released
        # Only now, that the figures were taken with no request since the release.
        answers[RELEASED] = complete(server, _SHORT).tokens
        say(f"{name}: {RELEASED}")
    return _Life(readings=readings, answers=answers, release_seconds=seconds)


def _read(server: Server, install: Install, config: Config, elastic: Elastic, folder: Path) -> _Reading:
    mappings = smaps.read(server.pid)
    resident = sum(m.rss for m in mappings if not m.name or m.name.startswith("["))
    if elastic.on:
        taken = sample(server, install, ledger_path(folder), "demo", 0)
        if taken is None:
            raise server.failed("no address range of an elastic cache in the log")
        if taken.usable != taken.mapped or not taken.held_min <= taken.mapped <= taken.held_max:
            raise server.failed(
                f"{taken.mapped} bytes logged as mapped; by the kernel {taken.usable} are usable, "
                f"{taken.held_min} to {taken.held_max} held"
            )
        return _Reading(reserved=taken.reserved, mapped=taken.mapped, resident=resident)
    match = _KV_SIZE.search(server.log_text())
    if match is None:
        raise server.failed("the log does not say how large the key-value cache is")
    size = int(float(match[1]) * _MIB)
    return _Reading(reserved=size, mapped=_held(server.pid, mappings, size), resident=resident)


def _held(pid: int, mappings: Sequence[smaps.Mapping], size: int) -> int:
    """How much of a stock cache of `size` bytes is in memory. Its address is not logged, but it is one block: a cache
    that is there in full is a run of that many bytes, all present, within one anonymous mapping."""
    fit = (m for m in mappings if m.usable and not m.name and m.end - m.start >= size)
    return min(size, max((smaps.longest_present_run(pid, m) for m in fit), default=0))
