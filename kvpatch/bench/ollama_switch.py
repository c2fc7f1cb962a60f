"""`switch` of two builds of Ollama: what one model costs, what alternating between two that are awake costs, and what
it costs where more take turns than are awake at once.

All of it beside a ballast process that holds the card but for the budget. `ollama serve` of both sides run at the same
time; where the figures of one side need the whole budget, the other's models are unloaded first, and the sides take
turns `starts` times, their models loaded anew each time.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kvpatch.bench.figures import Report
from kvpatch.bench.ollama_models import Member
from kvpatch.bench.ollama_pools import asleep_bytes
from kvpatch.bench.ollama_servers import AWAKE, SIDES, Setup, Talker, talker
from kvpatch.smoke.models import prompt_text
from kvpatch.smoke.report import Progress

SINGLE_RATIO = 0.99
ADDED_MS = 10.0
COPY_FACTOR = 1.15
SWITCH_MS = 40.0

Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """`leave`: bytes that the models of a side share. `small`: a context with which two stock models fit. `crowd`: more
    models than fit awake. `rounds`: of each start; `turns`: rounds through the crowd, of which the stock side, which
    loads its model each time, does `stock_turns`. `batch`: as in Setup."""

    leave: int = 20_000_000_000
    context: int = 65536
    small: int = 4096
    tokens: int = 1000
    answer: int = 128
    crowd: int = 5
    starts: int = 3
    rounds: int = 12
    turns: int = 6
    stock_turns: int = 1
    batch: int = 0

    @property
    def least_context(self) -> int:
        return self.tokens + self.answer + 1

    @property
    def models(self) -> int:
        return self.crowd


SHORT = Plan(
    context=32768,
    batch=64,
    small=1024,
    tokens=300,
    answer=16,
    starts=2,
    rounds=3,
    turns=2,
)


def run(setup: Setup, plan: Plan, progress: Progress) -> Report:
    """Measure. Raises CheckFailed when a server does not do what was to be timed."""
    report = Report(kind="ollama-switch", facts=dict(setup.facts))
    report.facts["plan"] = asdict(plan)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(setup.device.ballast(setup.budget))
        if held is not None:
            report.facts["ballast"] = held
        else:
            report.notes.append(
                "no ballast on a CPU: the budget bounds the patched server alone, the stock one has all of the memory"
            )
        talkers = {side: stack.enter_context(talker(setup, side)) for side in SIDES}
        single, pairs, small = _Single(report), _Pairs(plan.context), _Pairs(plan.small)
        for start in range(plan.starts):
            progress(f"switch: start {start + 1} of {plan.starts}")
            single.measure(setup, plan, talkers, start)
            for side in _order(SIDES, start):
                # What alternating costs stock where two fit, and where they do not.
                contexts = (small, pairs) if side == "stock" else (pairs,)
                for pair in contexts:
                    # On a full card each of stock's answers is a load of seconds: once shows it.
                    loads = side == "stock" and pair is pairs and setup.on_gpu
                    if not loads or start == 0:
                        pair.measure(setup, plan, talkers[side], 2 if loads else plan.rounds)
        single.show()
        _show_pairs(report, plan, pairs, small)
        _crowd(setup, plan, report, talkers, progress)
    return report


class Conversation:
    """A model with tokens in its cache, and what it said at first."""

    def __init__(self, one: Talker, member: Member, plan: Plan, context: int, salt: int) -> None:
        self.member = member
        self._one, self._context, self._count = one, context, min(plan.answer, 32)
        self._asked = prompt_text(plan.tokens, salt)
        self.expected = one.ask(member, self._asked, self._count, context).text
        # The second answer is what later ones are held against: they too find all but the last token in the cache.
        self.expected = self.answer()

    def answer(self) -> str:
        return self._one.ask(self.member, self._asked, self._count, self._context).text

    def first_ms(self, *, keep: str | None = None) -> float:
        """Of a request whose prompt is in the cache but for its last token."""
        return self._one.ask(self.member, self._asked, 1, self._context, keep=keep).first_ms

    def check(self) -> None:
        """The same answer as before. Raises CheckFailed for another one."""
        if self.answer() != self.expected:
            raise self._one.server.failed(f"{self.member.name} does not repeat its answer")


class _Single:
    """One model, loaded on both sides at the same time and asked in turns."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._whole: Values = {side: [] for side in SIDES}
        self._decode: Values = {side: [] for side in SIDES}
        self._first: Values = {side: [] for side in SIDES}
        self._new: Values = {side: [] for side in SIDES}

    def measure(self, setup: Setup, plan: Plan, talkers: Mapping[str, Talker], start: int) -> None:
        member = setup.store.members[0]
        asked = prompt_text(plan.tokens // 2, 7)
        context = max(plan.small, plan.least_context)
        for side in _order(SIDES, start):
            # Twice: what is built at the first step of its kind is not what is timed.
            for _ in range(2):
                talkers[side].ask(member, asked, plan.answer, context)
        for number in range(plan.rounds):
            for side in _order(SIDES, number + start):
                one = talkers[side]
                answer = one.ask(member, asked, plan.answer, context)
                self._whole[side].append(answer.tokens / answer.whole_ms * 1000)
                self._decode[side].append(answer.rate)
                self._first[side].append(one.ask(member, asked, 1, context).first_ms)
                fresh = prompt_text(plan.tokens // 2, 1000 * (start + 1) + number)
                self._new[side].append(one.ask(member, fresh, 1, context).first_ms)
                one.ask(member, asked, 1, context)  # its prompt is in the cache again
        for one in talkers.values():
            one.unload(setup.store.members)

    def show(self) -> None:
        section, report = "single model", self._report
        whole = report.row(
            section, "throughput, whole request through the API", "tokens/s", self._whole, draw=True
        )
        report.row(section, "decode, the server's own clock", "tokens/s", self._decode, draw=True)
        report.row(section, "first token, prompt in the cache", "ms", self._first, draw=True)
        report.row(section, "first token, new prompt", "ms", self._new, draw=True)
        if whole is not None:
            report.at_least(
                "single model, throughput through the API",
                whole.ratio["on"],
                SINGLE_RATIO,
                "ratio",
                "stock's",
            )


class _Pairs:
    """Two models in turn, at one context."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.alone: Values = {}
        self.both: Values = {}
        self.loads: dict[str, int] = {}

    def measure(self, setup: Setup, plan: Plan, one: Talker, rounds: int) -> None:
        members = setup.store.members[:2]
        alone, both = self.alone.setdefault(one.side, []), self.both.setdefault(one.side, [])
        first = Conversation(one, members[0], plan, self._context(plan), 1)
        first.first_ms()
        alone += [first.first_ms() for _ in range(2 * rounds)]
        second = Conversation(one, members[1], plan, self._context(plan), 2)
        before = one.did("start")
        if one.side == "on":
            one.wait_state(members, AWAKE)
            was = one.history()
        for _ in range(rounds):
            both += [first.first_ms(), second.first_ms()]
        if one.side == "on" and one.history() != was:
            raise one.server.failed("two models that were awake were put to sleep, woken or loaded")
        self.loads[one.side] = self.loads.get(one.side, 0) + one.did("start") - before
        first.check()
        second.check()
        one.unload(setup.store.members)

    def _context(self, plan: Plan) -> int:
        return max(self.context, plan.least_context)

    def added(self, side: str) -> float:
        return statistics.median(self.both[side]) - statistics.median(self.alone[side])


def _show_pairs(report: Report, plan: Plan, pairs: _Pairs, small: _Pairs) -> None:
    section = f"2 models in turn, num_ctx {plan.context}"
    report.row(section, "first token, one alone", "ms", pairs.alone)
    report.row(section, "first token, two in turn", "ms", pairs.both, draw=True)
    report.row(section, "added", "ms", {side: [pairs.added(side)] for side in pairs.both})
    report.row(section, "loads while in turn", "", {k: [float(v)] for k, v in pairs.loads.items()})
    both_fit = f"2 models in turn, stock num_ctx {plan.small}"
    report.row(both_fit, "first token, one alone", "ms", small.alone)
    report.row(both_fit, "first token, two in turn", "ms", small.both)
    report.row(both_fit, "added", "ms", {side: [small.added(side)] for side in small.both})
    report.at_most(
        "two awake in turn, added to the first token", pairs.added("on"), ADDED_MS, "ms", "medians"
    )


def _crowd(
    setup: Setup, plan: Plan, report: Report, talkers: Mapping[str, Talker], progress: Progress
) -> None:
    """More models than fit awake, always the one whose turn was longest ago: each request finds its model asleep."""
    rates = setup.device.rates()
    rate = statistics.median(rates)
    section = f"{plan.crowd} models in turn"
    times: Values = {}
    one = talkers["on"]
    progress(f"switch: {plan.crowd} patched models in turn")
    talks = _gather(setup, plan, one)
    for talk in talks:  # the last of them sleep for the first time
        talk.first_ms()
    slept = one.took("sleep")
    asked, woken = 0, one.did("wake")
    starts = one.did("start")
    times["on"] = []
    for _ in range(plan.turns):
        for talk in talks:
            times["on"].append(talk.first_ms())
            asked += 1
    woken = one.did("wake") - woken
    if one.did("start") != starts:
        raise one.server.failed("a model was loaded again while models took turns")
    weights, kv = asleep_bytes(setup, one)
    for talk in talks:
        talk.check()
    later = [ms for name, values in one.took("sleep").items() for ms in values[len(slept.get(name, [])) :]]
    firsts = [values[0] for values in one.took("sleep").values() if values]
    woke = [ms for values in one.took("wake").values() for ms in values]
    one.unload(setup.store.members)
    progress(f"switch: {plan.crowd} stock models in turn")
    stock = talkers["stock"]
    talks = _gather(setup, plan, stock)
    times["stock"] = [talk.first_ms() for _ in range(plan.stock_turns) for talk in talks]
    stock.unload(setup.store.members)
    report.facts["crowd"] = {"requests": asked, "wakes": woken}
    report.row(section, "request to first token", "ms", times, draw=True)
    report.row(section, "the first sleep of each", "ms", {"on": firsts})
    report.row(section, "sleep, host copy warm", "ms", {"on": later})
    report.row(section, "wake, of it", "ms", {"on": woke})
    report.row(section, "weights in", "bytes", {"on": [float(v) for v in weights]})
    report.row(section, "KV, each of out and in", "bytes", {"on": [float(v) for v in kv]})
    report.row(section, "plain pinned copy", "GB/s", {"on": [value / 1e9 for value in rates]})
    # Else less was timed than is meant.
    report.at_least("requests whose model slept, of all", woken / asked, 1.0, "ratio")
    if not woken:
        report.notes.append(f"{plan.crowd} models fit awake: nothing was woken; lower the --budget")
        return
    moved = (statistics.median(weights) + 2 * statistics.median(kv)) / rate * 1000
    report.at_most(
        "more models than fit awake, switch to first token",
        statistics.median(times["on"]),
        COPY_FACTOR * moved + SWITCH_MS,
        "ms",
        f"{COPY_FACTOR} x {moved:.1f} ms of copies + {SWITCH_MS:g} ms",
    )


def _gather(setup: Setup, plan: Plan, one: Talker) -> list[Conversation]:
    return [
        Conversation(one, member, plan, plan.context, number)
        for number, member in enumerate(setup.store.members[: plan.crowd], 1)
    ]


def _order(sides: Sequence[str], number: int) -> Sequence[str]:
    return sides if number % 2 == 0 else tuple(reversed(sides))
