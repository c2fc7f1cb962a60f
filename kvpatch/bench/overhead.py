"""`overhead`: what an elastic server costs beside a stock one that does the same: decode, prefill, each single step.

Stock, patched with the switch off, and patched with it on are alive together and take turns, in another order each
round, and all are started anew several times, in another order each time: where a process happens to lie in memory
moves its speed by about as much as is looked for. What the switched-off server differs by is what chance does here.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TypeVar

from kvpatch.bench import cells
from kvpatch.bench.figures import Report, percentile
from kvpatch.bench.servers import Client, Setup, Side, client, spec
from kvpatch.estimate import EstimateError
from kvpatch.smoke.llama import STEP_CELLS
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.report import Progress

LEAST_RATIO = 0.99
STEP_MS = 1.0  # what a slow step may cost more than stock's, and a step that maps more than one that does not

Values = dict[str, list[float]]
_Any = TypeVar("_Any")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is measured. `context`: cells reserved where one slot is measured; `slot_context`: of each slot where
    there are several. `rounds`, `steps` (single ones): a side, in all starts together. `chunk`: single steps from one
    server before it is the next one's turn."""

    batches: tuple[int, ...] = (1, 8, 32)
    prefills: tuple[int, ...] = (512, 8192)
    rounds: int = 8
    starts: int = 4
    answer: int = 128
    steps: int = 5120
    chunk: int = 128
    context: int = 131072
    slot_context: int = 4096

    @property
    def least_context(self) -> int:
        """Cells without which a prompt does not fit."""
        return max(*self.prefills, STEP_CELLS + self.chunk) + STEP_CELLS


# For a CPU in CI: everything runs, nothing is measured well.
SHORT = Plan(
    batches=(1, 4),
    prefills=(64, 512),
    rounds=2,
    starts=1,
    answer=24,
    steps=256,
    context=4096,
    slot_context=512,
)


def run(setup: Setup, plan: Plan, progress: Progress) -> Report:
    """Measure. Raises CheckFailed when a server does not do what was to be timed."""
    report = Report(kind="overhead", facts=dict(setup.facts))
    report.facts["plan"] = asdict(plan)
    _many_slots(report, setup, plan, [batch for batch in plan.batches if batch > 1], progress)
    _one_slot(report, setup, plan, progress)
    for row in report.rows:
        if row.section in ("decode", "prefill") and "on" in row.ratio:
            report.at_least(
                f"{row.section}, {row.name}", row.ratio["on"], LEAST_RATIO, "ratio", "patched / stock"
            )
    return report


@contextlib.contextmanager
def _all(setup: Setup, start: int, *, context: int, slots: int) -> Iterator[list[Client]]:
    with contextlib.ExitStack() as stack:
        found = []
        for side in in_turn(setup.sides, start):
            started = spec(setup, side, context=context, slots=slots)
            found.append(stack.enter_context(client(setup, side, started)))
        yield found


def in_turn(all_of: Sequence[_Any], number: int) -> list[_Any]:
    """An order of its own for each of six rounds: another begins, and of two neighbours now one is first, now the
    other."""
    shift = number // 2 % len(all_of)
    order = [*all_of[shift:], *all_of[:shift]]
    return order[::-1] if number % 2 else order


def _turns(clients: Sequence[Client], rounds: int, start: int) -> Iterator[tuple[int, Client]]:
    """Every client once a round; with the number of the round among those of all starts."""
    for number in range(start * rounds, (start + 1) * rounds):
        for one in in_turn(clients, number):
            yield number, one


def _empty(sides: Sequence[Side]) -> Values:
    return {side.name: [] for side in sides}


def _many_slots(report: Report, setup: Setup, plan: Plan, batches: Sequence[int], progress: Progress) -> None:
    """Decode of several answers at once, by one server with as many slots as the most of them need."""
    if not batches:
        return
    rates = {batch: _empty(setup.sides) for batch in batches}
    slots = max(batches)
    for start in range(plan.starts):
        progress(
            f"overhead: decode at batch {', '.join(map(str, batches))}, start {start + 1} of {plan.starts}"
        )
        with _all(setup, start, context=slots * plan.slot_context, slots=slots) as clients:
            for one in clients:
                one.together([prompt_ids(16, salt) for salt in range(slots)], 8)
            for batch in batches:
                for number, one in _turns(clients, -(-plan.rounds // plan.starts), start):
                    asked = [prompt_ids(16, 1 + salt + number * batch) for salt in range(batch)]
                    rates[batch][one.side.name].append(_rate(one, asked, plan.answer))
    for batch in batches:
        report.row("decode", f"batch {batch}", "tokens/s", rates[batch], draw=True)


def _rate(one: Client, asked: Sequence[Sequence[int]], count: int) -> float:
    """Tokens a second of all answers together; the first token comes out of the prompt and is not counted."""
    answers = one.together(asked, count)
    return sum((count - 1) * 1000.0 / answer.predicted_ms for answer in answers)


def _one_slot(report: Report, setup: Setup, plan: Plan, progress: Progress) -> None:
    """Decode at batch 1, prefill, and single steps: by the same servers."""
    decode = _empty(setup.sides)
    kept = {size: _empty(setup.sides) for size in plan.prefills}
    fresh = {size: _empty(setup.sides) for size in plan.prefills}
    steps = {side.name: _Steps() for side in setup.sides}
    rounds = -(-plan.rounds // plan.starts)
    for start in range(plan.starts):
        progress(f"overhead: one slot, start {start + 1} of {plan.starts}")
        with _all(setup, start, context=plan.context, slots=1) as clients:
            for one in clients:
                one.complete(prompt_ids(max(plan.prefills)), 8, cached=False)
            if 1 in plan.batches:
                for number, one in _turns(clients, rounds, start):
                    decode[one.side.name].append(_rate(one, [prompt_ids(16, 1 + number)], plan.answer))
            for size in plan.prefills:
                for one in clients:
                    one.complete(prompt_ids(size, 99), 1, cached=False)
                for number, one in _turns(clients, rounds, start):
                    kept[size][one.side.name].append(_prefill(one, size, 100 + number))
                for number, one in _turns(clients, rounds, start):
                    one.erase()
                    fresh[size][one.side.name].append(_prefill(one, size, 200 + number))
            _single_steps(report, setup, plan, clients, start, steps, progress)
    if 1 in plan.batches:
        report.row("decode", "batch 1", "tokens/s", decode, draw=True)
    for size in plan.prefills:
        report.row("prefill", f"{size} tokens", "tokens/s", kept[size], draw=True)
        report.row("prefill, cache just erased", f"{size} tokens", "tokens/s", fresh[size], draw=True)
    report.notes.append(
        "prefill: pages that an earlier prompt used are still there; cache just erased: every page is mapped anew"
    )
    _show_steps(report, steps)


def _prefill(one: Client, size: int, salt: int) -> float:
    answer = one.complete(prompt_ids(size, salt), 1, cached=False)
    return answer.prompt_n * 1000.0 / answer.prompt_ms


class _Steps:
    """Milliseconds of single steps, by what the step did."""

    def __init__(self) -> None:
        self.maps: list[float] = []  # the first cell of a page: reads on where nothing was mapped before
        self.reads_more: list[
            float
        ] = []  # reads another 256 cells, all of them mapped (stock's own cost of that)
        self.plain: list[float] = []

    @property
    def all(self) -> list[float]:
        return [*self.maps, *self.reads_more, *self.plain]

    def add(self, first: int, found: Sequence[float], maps: Callable[[int], bool]) -> None:
        """`found`: of the steps that decode the tokens of the cells `first`, `first` + 1, ..."""
        for cell, value in enumerate(found, first):
            if maps(cell):
                self.maps.append(value)
            elif cell % STEP_CELLS == 0:
                self.reads_more.append(value)
            else:
                self.plain.append(value)


def _single_steps(
    report: Report,
    setup: Setup,
    plan: Plan,
    clients: Sequence[Client],
    start: int,
    found: dict[str, _Steps],
    progress: Progress,
) -> None:
    """Each answer begins a little before a cell that maps (of three one before 256 cells that do not), in a cache that
    was just erased, and grows over it."""
    maps, places = _places(report, setup, plan, clients)
    chunks = max(1, -(-plan.steps // (plan.chunk - 1) // plan.starts))
    progress(f"overhead: {chunks} answers of {plan.chunk} single steps, over the cells {places}")
    for number, one in _turns(clients, chunks, start):
        length = places[number % len(places)] - plan.chunk // 4
        one.erase()
        answer = one.stream(prompt_ids(length, 300 + number), plan.chunk, cached=False)
        # The first token comes out of the prompt; the first step decodes it, in the cell behind the prompt.
        found[one.side.name].add(length, answer.step_ms, maps)


def _places(
    report: Report, setup: Setup, plan: Plan, clients: Sequence[Client]
) -> tuple[Callable[[int], bool], list[int]]:
    """Which cells map, and the cells that answers are to grow over."""
    last = plan.context - plan.chunk
    some = list(range(STEP_CELLS, min(last, 8 * STEP_CELLS), STEP_CELLS))
    page = max(one.page_bytes() for one in clients)
    try:
        growth = cells.growth(setup, context=plan.context, page=page)
    except EstimateError as error:
        note = f"{cells.UNJUDGED}, nor what a step that maps takes: {error.message}"
        if note not in report.notes:
            report.notes.append(note)
        return (lambda _: False), some
    those = [cell for cell in islice(growth.boundaries(), 4) if cell < last]
    others = [cell for cell in some if not growth.maps(cell)]
    pairs = [those[number : number + 2] for number in range(0, len(those), 2)]
    return growth.maps, [
        cell for number, pair in enumerate(pairs) for cell in (*pair, *others[number : number + 1])
    ] or some


def _show_steps(report: Report, steps: dict[str, _Steps]) -> None:
    kinds = {
        "all": "all",
        "that map": "maps",
        "that read 256 cells more": "reads_more",
        "of the others": "plain",
    }
    for name, kind in kinds.items():
        values: Values = {side: getattr(found, kind) for side, found in steps.items()}
        report.row("steps", name, "ms", values, draw=name != "all")
    for percent in (50, 99, 99.9):
        found = {side: [percentile(s.all, percent)] for side, s in steps.items() if s.all}
        report.row("steps", f"p{percent:g}", "ms", found)
    stock, on = steps["stock"], steps["on"]
    slow = percentile(on.all, 99.9) - percentile(stock.all, 99.9)
    chance = percentile(steps["off"].all, 99.9) - percentile(stock.all, 99.9)
    report.at_most(
        "p99.9 of a step over stock's",
        slow,
        STEP_MS,
        "ms",
        f"{len(on.all)} steps a side; switched off {chance:+.3f} ms",
    )
    if on.maps and on.plain:
        extra = statistics.median(on.maps) - statistics.median([*on.reads_more, *on.plain])
        same = statistics.median(stock.maps) - statistics.median([*stock.reads_more, *stock.plain])
        report.row("steps", "that map, over the others", "ms", {"stock": [same], "on": [extra]})
        report.at_most(
            "steps that map over those that do not",
            extra - same,
            STEP_MS,
            "ms",
            "medians, beyond stock's own",
        )
        report.notes.append(
            "that map: the step reads the first cell of a page; stock maps nothing there, but reads 256 cells more "
            "and may build its CUDA graph again, as it does at the other multiples of 256"
        )
