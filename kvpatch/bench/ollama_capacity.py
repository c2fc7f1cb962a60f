"""`capacity` of two builds of Ollama: how many models are awake at once, and what an idle one holds.

A model counts as awake with all before it if, with each one's tokens in its cache, all of them are answered twice in
turn and nothing was put to sleep, woken, unloaded or loaded from the first of these answers to the last. The sides run
one after the other, each with the whole budget, `starts` times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kvpatch.bench.figures import Report
from kvpatch.bench.ollama_models import Member
from kvpatch.bench.ollama_pools import Look, driver_used, look
from kvpatch.bench.ollama_servers import ASLEEP, SIDES, Setup, Talker, talker
from kvpatch.bench.ollama_switch import Conversation
from kvpatch.bench.ollama_switch import Plan as SwitchPlan
from kvpatch.smoke.report import CheckFailed, Progress

TIMES_STOCK = 3.0
TOP_GAP = 0.02
_SLEEP_SOON = "1s"

Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """`leave`: bytes that the models of a side share. `most`: models that are tried; `rounds`: times that all are asked
    in turn."""

    leave: int = 20_000_000_000
    context: int = 65536
    tokens: int = 1000
    answer: int = 32
    most: int = 5
    starts: int = 2
    rounds: int = 2
    batch: int = 0

    @property
    def least_context(self) -> int:
        return self.tokens + self.answer + 1

    @property
    def models(self) -> int:
        return self.most


SHORT = Plan(context=32768, batch=64, tokens=300, answer=16, starts=1)


def run(setup: Setup, plan: Plan, progress: Progress) -> Report:
    """Measure. Raises CheckFailed when a server does not do what was to be timed."""
    report = Report(kind="ollama-capacity", facts=dict(setup.facts))
    report.facts["plan"] = asdict(plan)
    found = {side: _Found() for side in SIDES}
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(setup.device.ballast(setup.budget))
        if held is not None:
            report.facts["ballast"] = held
        for start in range(plan.starts):
            for side in SIDES if start % 2 == 0 else tuple(reversed(SIDES)):
                progress(f"capacity: {side}, start {start + 1} of {plan.starts}")
                before = driver_used(setup)
                with talker(setup, side) as one:
                    _measure(setup, plan, one, found[side], before)
    _show(setup, plan, report, found)
    return report


class _Found:
    """Of one side. `looks`: what `kvpatch top` showed at a time, and how far the driver was from it."""

    def __init__(self) -> None:
        self.awake: list[float] = []
        self.each: list[float] = []
        self.empty: list[float] = []
        self.asleep: list[float] = []
        self.unloaded: list[float] = []
        self.top: dict[str, list[tuple[Look, float]]] = {}
        self.kinds: Values = {}
        self.reserved: list[float] = []
        self.tried = 0


def _measure(setup: Setup, plan: Plan, one: Talker, found: _Found, before: int) -> None:
    hold = _Hold(setup, one, before)
    found.empty.append(hold.bytes())
    talks: list[Conversation] = []
    count, each = 0, 0.0
    for number, member in enumerate(setup.store.members[: plan.most], 1):
        try:
            talks.append(_converse(one, member, plan, number))
        except CheckFailed as failure:
            if number == 1 or not refused_for_memory(failure.detail):
                raise
            break
        if not all_awake(one, [talk.member for talk in talks], setup) or not _answered(one, talks, plan):
            break
        count = number
        each = hold.bytes() / count
        found.kinds = _kinds(one, talks)
        if one.side == "on":
            found.top.setdefault("all awake", []).append(_top(setup, one, before))
    found.tried = max(found.tried, len(talks))
    found.awake.append(float(count))
    found.each.append(each)
    if one.side == "on":
        if len(talks) > count:
            found.top.setdefault("one more than fits", []).append(_top(setup, one, before))
        members = tuple(talk.member for talk in talks)
        for talk in talks:
            talk.first_ms(keep=_SLEEP_SOON)
        one.wait_state(members, ASLEEP)
        found.asleep.append(hold.bytes() / len(talks))
        found.top.setdefault("all asleep", []).append(_top(setup, one, before))
        for talk in talks:
            talk.check()
    one.unload(setup.store.members)
    found.unloaded.append(hold.bytes())


def _converse(one: Talker, member: Member, plan: Plan, number: int) -> Conversation:
    like = SwitchPlan(tokens=plan.tokens, answer=plan.answer)
    return Conversation(one, member, like, plan.context, number)


def refused_for_memory(detail: str) -> bool:
    """Whether a failure is that of a model which does not fit; nothing else ends the count."""
    lower = detail.lower()
    return "was answered 5" in lower and any(word in lower for word in ("memory", "allocate", "limit"))


def all_awake(one: Talker, members: Sequence[Member], setup: Setup) -> bool:
    """Whether /api/ps shows all of them, and of a patched server with their weights and their tokens mapped."""
    shown = one.states()
    if one.side == "stock":
        return all(member.name in shown for member in members)
    return all(awake(shown.get(member.name, {}), setup.store.members[0].bytes) for member in members)


def awake(kv: Mapping[str, object], weights: int) -> bool:
    """Whether a `kvcached` object is that of a model of so many bytes that is awake, with tokens in its cache."""
    mapped, tokens = kv.get("weights_mapped"), kv.get("kv_mapped")
    if not isinstance(mapped, int) or not isinstance(tokens, int):
        return False
    # The embeddings' table stays on the host.
    return kv.get("state") == "awake" and mapped > weights // 2 and tokens > 0


def _answered(one: Talker, talks: Sequence[Conversation], plan: Plan) -> bool:
    """Whether all were answered in turn as before, and only answered."""
    was = one.history()
    for _ in range(plan.rounds):
        for talk in talks:
            talk.check()
    return one.history() == was


class _Hold:
    """What one side's models hold: of a GPU what the driver has in use since `before`, else the children's anonymous
    memory."""

    def __init__(self, setup: Setup, one: Talker, before: int) -> None:
        self._setup, self._one, self._before = setup, one, before

    def bytes(self) -> float:
        if self._setup.on_gpu:
            return float(driver_used(self._setup) - self._before)
        return float(sum(self._setup.device.held(pid) for pid in self._one.children().values()))


def _kinds(one: Talker, talks: Sequence[Conversation]) -> Values:
    shown = one.states()
    found: Values = {}
    for key in ("weights_mapped", "kv_mapped", "kv_reserved", "context_bytes", "charge"):
        values = [shown.get(talk.member.name, {}).get(key) for talk in talks]
        found[key] = [float(value) for value in values if isinstance(value, int)]
    return found


def _top(setup: Setup, one: Talker, before: int) -> tuple[Look, float]:
    seen = look(setup, one)
    return seen, seen.gap(before)


def _show(setup: Setup, plan: Plan, report: Report, found: Mapping[str, _Found]) -> None:
    on, stock = found["on"], found["stock"]
    section = f"3+ models, num_ctx {plan.context}, {plan.tokens} tokens each"
    report.row(section, "awake at once", "", {side: f.awake for side, f in found.items()}, draw=True)
    for key, values in on.kinds.items():
        report.row(section, f"each: {key}", "bytes", {"on": values})
    section = "idle model memory"
    where = "device use" if setup.on_gpu else "anonymous memory"
    report.row(section, f"{where}, nothing loaded yet", "bytes", {side: f.empty for side, f in found.items()})
    report.row(
        section, f"{where}, each, awake and idle", "bytes", {s: f.each for s, f in found.items()}, draw=True
    )
    report.row(
        section, f"{where}, each, asleep (stock: idle)", "bytes", {"stock": stock.each, "on": on.asleep},
        draw=True,
    )  # fmt: skip
    report.row(section, f"{where}, all unloaded", "bytes", {s: f.unloaded for s, f in found.items()})
    if setup.on_gpu:
        report.at_least(
            "models awake at once",
            min(on.awake),
            TIMES_STOCK * max(stock.awake),
            "",
            f"{TIMES_STOCK:g} x stock's",
        )
    else:
        fits = _by_reservation(setup, on)
        report.facts["fit_by_reservation"] = fits
        report.notes.append(
            "no ballast on a CPU: stock had all of the memory. The number awake is compared with what fits the budget "
            "when every cache is held in full"
        )
        report.at_least(
            "models awake at once",
            min(on.awake),
            TIMES_STOCK * fits,
            "",
            f"{TIMES_STOCK:g} x what fits reserved",
        )
    _show_top(setup, report, on)
    if on.tried <= max(on.awake):
        report.notes.append(f"all of the {on.tried} models that were tried were awake at once: more may fit")


def _by_reservation(setup: Setup, on: _Found) -> int:
    """Models that the budget holds when each has all that it reserves; one always is loaded."""
    charged = [
        charge - mapped + reserved
        for charge, mapped, reserved in zip(
            on.kinds.get("charge", ()),
            on.kinds.get("kv_mapped", ()),
            on.kinds.get("kv_reserved", ()),
            strict=True,
        )
    ]
    return max(1, int(setup.budget // max(charged))) if charged else 1


def _show_top(setup: Setup, report: Report, on: _Found) -> None:
    section = "kvpatch top"
    for when, looks in on.top.items():
        report.row(section, f"{when}: ledger", "bytes", {"on": [float(s.ledger) for s, _ in looks]})
        if not setup.on_gpu:
            continue
        report.row(section, f"{when}: contexts", "bytes", {"on": [float(s.contexts) for s, _ in looks]})
        report.row(section, f"{when}: apart from the driver's", "ratio", {"on": [gap for _, gap in looks]})
        report.at_most(
            f"kvpatch top, {when}: apart from the driver's use", max(gap for _, gap in looks), TOP_GAP, "ratio",
            "of the use since the start",
        )  # fmt: skip
    if not setup.on_gpu:
        report.notes.append(
            "on a CPU the driver's figure is the whole machine's: the ledger is not held against it"
        )
