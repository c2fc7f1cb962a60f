"""`idle`: what a model holds that nobody uses, and how long its next user waits.

A long context is reserved and a few tokens are in it. Stock and patched servers, one after the other and in turns, are
read after load, with the tokens in, and asleep by the same option (`--sleep-idle-seconds`); then a request wakes them.
Stock destroys everything and loads it again; the elastic one copies it back, which can be no faster than the bus: its
rate is measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

from kvpatch.bench import cells
from kvpatch.bench.figures import Report
from kvpatch.bench.servers import KINDS, Client, Setup, client, spec
from kvpatch.estimate import EstimateError
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.report import Progress

WAKE_RATIO = 1.15
ASLEEP_OVER_STOCK = 32 << 20

Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """`context` cells reserved, `tokens` in them. `starts`: servers a side; `sleeps`: of each elastic server, besides
    the one of idleness. `idle_seconds`: until a server goes to sleep."""

    context: int = 262144
    tokens: int = 1000
    starts: int = 2
    sleeps: int = 5
    idle_seconds: int = 2
    warm: int = 15

    @property
    def least_context(self) -> int:
        """Cells without which the tokens do not fit."""
        return self.tokens + 1


SHORT = Plan(context=16384, tokens=300, starts=1, sleeps=2, idle_seconds=1, warm=3)


class _Found:
    """Values by figure and side."""

    def __init__(self) -> None:
        self.values: dict[str, Values] = {}

    def add(self, name: str, side: str, value: float) -> None:
        self.values.setdefault(name, {}).setdefault(side, []).append(value)

    def median(self, name: str, side: str) -> float:
        return statistics.median(self.values[name][side])


def run(setup: Setup, plan: Plan, progress: Progress) -> Report:
    """Measure. Raises CheckFailed when a server does not do what was to be timed, or when the tokens after sleep are
    not those before."""
    report = Report(kind="idle", facts=dict(setup.facts))
    report.facts["plan"] = asdict(plan)
    progress("idle: the rate of plain copies to the device")
    rates = setup.device.rates()
    found = _Found()
    for start in range(plan.starts):
        for name in ("stock", "on") if start % 2 == 0 else ("on", "stock"):
            progress(f"idle: {name}, start {start + 1} of {plan.starts}")
            _life(setup, plan, name, found, report)
    rates += setup.device.rates()
    _show(report, found, rates)
    return report


def _life(setup: Setup, plan: Plan, name: str, found: _Found, report: Report) -> None:
    side = setup.side(name)
    extra = ("--sleep-idle-seconds", str(plan.idle_seconds))
    began = time.perf_counter()
    with client(setup, side, spec(setup, side, context=plan.context, extra=extra)) as one:
        found.add("start", name, time.perf_counter() - began)
        pid = one.server.pid
        found.add("after load", name, setup.device.held(pid))
        answered = 32
        asked = prompt_ids(plan.tokens - answered)
        found.add("first prompt after load", name, one.complete(asked, answered).prompt_ms / 1000)
        # Of a prompt in the cache, as it is after sleep too: one token by itself is rounded otherwise than in a batch.
        before = one.complete(asked, answered).tokens
        whole = [*asked, *before]
        found.add("with tokens", name, setup.device.held(pid))
        if side.elastic:
            _mapped(setup, plan, one, found, report)
        for _ in range(plan.warm):
            found.add("first token, awake", name, one.complete(whole, 1).seconds)
        one.until_asleep(plan.idle_seconds + 30.0)
        time.sleep(0.3)  # the driver's figures follow a moment later
        found.add("asleep", name, setup.device.held(pid))
        if not side.elastic:
            found.add("wake to first token", name, one.complete(whole, 1).seconds)
            return
        _asleep(one, found)
        found.add("sleep, the first", name, one.last_ms("sleep") / 1000)
        _wake(one, whole, found, "wake to first token, after the first sleep")
        for _ in range(plan.sleeps):
            found.add("sleep, host copy warm", name, one.command("sleep"))
            if not one.asleep():
                raise one.server.failed("POST /kvcached/sleep was answered, but the server is awake")
            _wake(one, whole, found, "wake to first token")
        after = one.complete(asked, answered)
        if after.tokens != before:
            raise one.server.failed("the answer after sleep is not the one before it")


def _mapped(setup: Setup, plan: Plan, one: Client, found: _Found, report: Report) -> None:
    mapped = one.mapped()
    # What look-ahead made ready is KV, counts as mapped, and holds nothing that sleep would have to keep.
    used = mapped["kv"] - mapped["ready"]
    found.add("KV in use", "on", used)
    found.add("KV mapped ahead", "on", mapped["ready"])
    found.add("weights", "on", mapped["weights"])
    found.add("compute", "on", mapped["compute"])
    found.add("to copy", "on", used + mapped["weights"])
    if any(b.name.startswith("KV") for b in report.bounds) or any(
        cells.UNJUDGED in note for note in report.notes
    ):
        return
    try:
        least = cells.growth(setup, context=plan.context, page=one.page_bytes()).mapped(plan.tokens)
    except EstimateError as error:
        report.notes.append(f"{cells.UNJUDGED}: {error.message}")
        return
    report.at_most("KV in use", used, least.mapped, "bytes", f"the page steps that {plan.tokens} tokens need")
    report.at_most(
        "KV mapped",
        mapped["kv"],
        least.mapped + least.ahead,
        "bytes",
        "and the step that look-ahead makes ready",
    )


def _asleep(one: Client, found: _Found) -> None:
    mapped = one.mapped()
    found.add("mapped, asleep", "on", sum(mapped[kind] for kind in KINDS))
    found.add("host memory, asleep", "on", mapped["host"])


def _wake(one: Client, whole: list[int], found: _Found, name: str) -> None:
    answer = one.complete(whole, 1)
    found.add(name, "on", answer.seconds)
    found.add("wake alone", "on", one.last_ms("wake") / 1000)
    found.add("prompt tokens after sleep", "on", answer.prompt_n)


_MEMORY = ("after load", "with tokens", "KV in use", "KV mapped ahead", "weights", "compute", "asleep")


def _show(report: Report, found: _Found, rates: list[float]) -> None:
    for name in (*_MEMORY, "mapped, asleep", "host memory, asleep", "to copy"):
        report.row("memory", name, "bytes", found.values.get(name, {}), draw=name in _MEMORY)
    for name in (
        "start",
        "first prompt after load",
        "first token, awake",
        "sleep, the first",
        "sleep, host copy warm",
        "wake to first token",
        "wake to first token, after the first sleep",
        "wake alone",
    ):
        values = {k: [v * 1000 for v in found_] for k, found_ in found.values.get(name, {}).items()}
        report.row("time", name, "ms", values, draw=name != "start")
    report.row("time", "plain copy to the device", "GB/s", {"bus": [rate / 1e9 for rate in rates]})
    over = found.median("asleep", "on") - found.median("asleep", "stock")
    report.at_most(
        "device use asleep over stock's", over, ASLEEP_OVER_STOCK, "bytes", "stock's idle-sleep process"
    )
    report.at_most(
        "mapped while asleep",
        max(found.values["mapped, asleep"]["on"]),
        0,
        "bytes",
        "no KV, weight or compute page",
    )
    report.at_most(
        "prompt tokens processed again after sleep",
        max(found.values["prompt tokens after sleep"]["on"]),
        1,
        "",
        "the last one always is",
    )
    copied = found.median("to copy", "on")
    floor = copied / statistics.median(rates)
    limit = (WAKE_RATIO * floor + found.median("first token, awake", "stock")) * 1000
    report.facts["wake_floor_ms"] = floor * 1000
    report.at_most(
        "wake to first token",
        found.median("wake to first token", "on") * 1000,
        limit,
        "ms",
        f"{WAKE_RATIO} x {copied / 1e9:.3f} GB at {statistics.median(rates) / 1e9:.1f} GB/s + stock's first token",
    )
    report.notes.append(
        "to copy: KV in use and weights; after load, with tokens, asleep: what the driver says a process holds"
        if report.facts.get("on") == "cuda"
        else "to copy: KV in use and weights; on a CPU what sleeps is kept in the same memory"
    )
