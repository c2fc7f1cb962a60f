"""`switch`: several models on a card that stock can fill with one: how many are awake at once, and what changing from
one to another costs.

A ballast process holds the card but for `leave` bytes. Servers are started one after another, all with the same
context; each has tokens in its cache; then they answer in turn.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from kvpatch.bench.figures import Report
from kvpatch.bench.servers import Client, Setup, client, spec
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.report import CheckFailed, Progress

ADDED_MS = 10.0

Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """`leave`: bytes of the card that the servers share. `small`: the context at which two stock servers are compared
    where two with `context` do not fit. `rounds`: answers of each server in each part."""

    leave: int = 20_000_000_000
    context: int = 65536
    small: int = 4096
    tokens: int = 1000
    models: int = 3
    rounds: int = 20
    sleeps: int = 5
    answer: int = 32

    @property
    def least_context(self) -> int:
        """Cells without which the tokens do not fit."""
        return self.tokens + 1


SHORT = Plan(context=8192, small=1024, tokens=300, rounds=3, sleeps=2, answer=16)


def run(setup: Setup, plan: Plan, progress: Progress) -> Report:
    """Measure. Raises CheckFailed when a patched server does not do what was to be timed."""
    report = Report(kind="switch", facts=dict(setup.facts))
    report.facts["plan"] = asdict(plan)
    alone: Values = {}
    both: Values = {}
    with setup.device.ballast(plan.leave) as held:
        if held is not None:
            report.facts["ballast"] = held
        progress("switch: two patched servers")
        _pair(setup, plan, "on", plan.context, alone, both)
        progress("switch: two stock servers")
        try:
            _pair(setup, plan, "stock", plan.context, alone, both)
        except CheckFailed as failure:
            report.notes.append(
                f"two stock servers with {plan.context} cells do not fit ({_why(failure)}); they are compared with "
                f"{plan.small} cells"
            )
            alone.pop("stock", None)
            both.pop("stock", None)
            _pair(setup, plan, "stock", plan.small, alone, both)
        _show_pair(report, alone, both)
        progress(f"switch: {plan.models} patched servers")
        _many(setup, plan, report)
        progress(f"switch: {plan.models} stock servers")
        _stock(setup, plan, report)
    return report


class _Talk:
    """A server and its conversation."""

    def __init__(self, one: Client, plan: Plan, salt: int) -> None:
        self.one = one
        self._asked = prompt_ids(plan.tokens - plan.answer, salt)
        self._count = plan.answer
        one.complete(self._asked, plan.answer)
        # The second answer is what later ones are held against: they too find all but the last token in the cache, and
        # one token by itself is rounded otherwise than as the last one of a batch.
        self.expected = one.complete(self._asked, plan.answer).tokens
        self._whole = [*self._asked, *self.expected]

    def first_token_ms(self) -> float:
        """Of a request whose prompt is in the cache but for its last token."""
        return self.one.complete(self._whole, 1).seconds * 1000

    def check(self) -> None:
        """The same answer as before. Raises CheckFailed for another one."""
        if self.one.complete(self._asked, self._count).tokens != self.expected:
            raise self.one.server.failed(f"{self.one.server.name} does not repeat its answer")


@contextlib.contextmanager
def _talk(setup: Setup, plan: Plan, side: str, context: int, number: int) -> Iterator[_Talk]:
    who = setup.side(side)
    started = spec(setup, who, context=context, name=f"llama-server-{side}-{number}")
    with client(setup, who, started) as one:
        yield _Talk(one, plan, number)


def _pair(setup: Setup, plan: Plan, side: str, context: int, alone: Values, both: Values) -> None:
    with _talk(setup, plan, side, context, 1) as first:
        first.first_token_ms()
        alone[side] = [first.first_token_ms() for _ in range(2 * plan.rounds)]
        with _talk(setup, plan, side, context, 2) as second:
            both[side] = []
            for _ in range(plan.rounds):
                both[side] += [first.first_token_ms(), second.first_token_ms()]
            first.check()
            second.check()


def _show_pair(report: Report, alone: Values, both: Values) -> None:
    report.row("two in turn", "first token, one server alone", "ms", alone, draw=True)
    report.row("two in turn", "first token, two in turn", "ms", both, draw=True)
    added = {side: statistics.median(both[side]) - statistics.median(alone[side]) for side in alone}
    report.row("two in turn", "added", "ms", {side: [value] for side, value in added.items()})
    report.at_most("first token, two in turn over one alone", added["on"], ADDED_MS, "ms", "medians")


def _many(setup: Setup, plan: Plan, report: Report) -> None:
    with contextlib.ExitStack() as stack:
        talks = [
            stack.enter_context(_talk(setup, plan, "on", plan.context, number))
            for number in range(1, plan.models + 1)
        ]
        turns: list[float] = []
        for _ in range(plan.rounds):
            turns += [talk.first_token_ms() for talk in talks]
        for talk in talks:
            talk.check()
        awake = [talk for talk in talks if not talk.one.asleep()]
        mapped = [talk.one.mapped() for talk in awake]
        holds = [float(setup.device.held(talk.one.server.pid)) for talk in talks]
        section = f"{plan.models} awake"
        report.row(section, "first token, in turn", "ms", {"on": turns}, draw=True)
        for kind in ("weights", "kv", "compute", "reserved"):
            report.row(section, f"mapped: {kind}" if kind != "reserved" else kind, "bytes", {
                "on": [float(m.get(kind, 0)) for m in mapped]
            })  # fmt: skip
        report.row(section, "device use of each", "bytes", {"on": holds})
        full = setup.model.bytes // 2
        ready = [m for m in mapped if m.get("kv", 0) and m.get("weights", 0) > full]
        report.at_least(
            "models awake at once, weights mapped", len(ready), plan.models, "", "and tokens in each"
        )
        _asleep_in_turn(plan, report, talks)


def _asleep_in_turn(plan: Plan, report: Report, talks: Sequence[_Talk]) -> None:
    """One awake at a time: each is woken by its request, and put to sleep after it."""
    first = [talk.one.command("sleep") * 1000 for talk in talks]
    slept: list[float] = []
    woke: list[float] = []
    for _ in range(plan.sleeps):
        for talk in talks:
            woke.append(talk.first_token_ms())
            slept.append(talk.one.command("sleep") * 1000)
    for talk in talks:
        talk.check()
    section = "one awake at a time"
    report.row(section, "the first sleep of each", "ms", {"on": first})
    report.row(section, "sleep, host copy warm", "ms", {"on": slept})
    report.row(section, "wake to first token", "ms", {"on": woke}, draw=True)


def _stock(setup: Setup, plan: Plan, report: Report) -> None:
    with contextlib.ExitStack() as stack:
        talks = []
        for number in range(1, plan.models + 1):
            try:
                talks.append(stack.enter_context(_talk(setup, plan, "stock", plan.context, number)))
            except CheckFailed as failure:
                report.notes.append(
                    f"stock server {number} of {plan.models} with {plan.context} cells could not load: {_why(failure)}"
                )
                break
        holds = [float(setup.device.held(talk.one.server.pid)) for talk in talks]
        report.row(f"{plan.models} awake", "device use of each", "bytes", {"stock": holds})
        report.facts["stock_awake_at_once"] = len(talks)
    if setup.device.name == "cuda":
        up = report.facts["stock_awake_at_once"]
        report.at_most("stock models awake at once", up, plan.models - 1, "", "else nothing is shown")


def _why(failure: CheckFailed) -> str:
    """The line of a server's log that says why it did not load, else what was noticed."""
    for text in failure.logs.values():
        for line in text.splitlines():
            if any(
                word in line.lower() for word in ("out of memory", "failed to allocate", "unable to allocate")
            ):
                return line.strip()
    return failure.detail
