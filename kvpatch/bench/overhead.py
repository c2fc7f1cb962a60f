"""`overhead`: what an elastic server costs beside a stock one that does the same: decode, prefill, each single step.

Stock, patched with the switch off, and patched with it on are alive together and take turns, who begins changes from
round to round, and all are started anew several times: where a process happens to lie in memory moves its speed by
about as much as is looked for.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpatch.bench.figures import Report, percentile
from kvpatch.bench.servers import STEP_CELLS, Client, Setup, Side, client, prompt, spec
from kvpatch.smoke.report import Progress

LEAST_RATIO = 0.99
STEP_MS = 1.0  # what a slow step may cost more than stock's, and a step that maps more than one that does not

Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is measured. `context`: cells reserved where one slot is measured; `slot_context`: of each slot where
    there are several. `steps`: single steps a side, in all."""

    batches: tuple[int, ...] = (1, 8, 32)
    prefills: tuple[int, ...] = (512, 8192)
    rounds: int = 6
    starts: int = 4
    answer: int = 192
    steps: int = 5120
    context: int = 131072
    slot_context: int = 4096


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
    report.facts["plan"] = {name: getattr(plan, name) for name in Plan.__slots__}
    for batch in plan.batches:
        if batch > 1:
            _decode(report, setup, plan, batch, progress)
    _one_slot(report, setup, plan, progress)
    for row in report.rows:
        if row.section in ("decode", "prefill") and "on" in row.ratio:
            report.at_least(
                f"{row.section}, {row.name}", row.ratio["on"], LEAST_RATIO, "ratio", "patched / stock"
            )
    return report


@contextlib.contextmanager
def _all(setup: Setup, *, context: int, slots: int) -> Iterator[list[Client]]:
    with contextlib.ExitStack() as stack:
        found = []
        for side in setup.sides:
            started = spec(setup, side, context=context, slots=slots)
            found.append(stack.enter_context(client(setup, side, started)))
        yield found


def _turns(clients: Sequence[Client], rounds: int) -> Iterator[tuple[int, Client]]:
    """Every client once a round; another one begins each time."""
    for number in range(rounds):
        shift = number % len(clients)
        for one in (*clients[shift:], *clients[:shift]):
            yield number, one


def _empty(sides: Sequence[Side]) -> Values:
    return {side.name: [] for side in sides}


def _decode(report: Report, setup: Setup, plan: Plan, batch: int, progress: Progress) -> None:
    rates = _empty(setup.sides)
    for start in range(plan.starts):
        progress(f"overhead: decode at batch {batch}, start {start + 1} of {plan.starts}")
        with _all(setup, context=batch * plan.slot_context, slots=batch) as clients:
            for one in clients:
                one.together([prompt(16, salt) for salt in range(batch)], 8)
            for number, one in _turns(clients, -(-plan.rounds // plan.starts)):
                asked = [prompt(16, 1 + salt + number * batch) for salt in range(batch)]
                rates[one.side.name].append(_rate(one, asked, plan.answer))
    report.row("decode", f"batch {batch}", "tokens/s", rates, draw=True)


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
        with _all(setup, context=plan.context, slots=1) as clients:
            for one in clients:
                one.complete(prompt(max(plan.prefills)), 8, cached=False)
            if 1 in plan.batches:
                for number, one in _turns(clients, rounds):
                    decode[one.side.name].append(_rate(one, [prompt(16, 1 + number)], plan.answer))
            for size in plan.prefills:
                _prefill(clients, size, rounds, kept[size], fresh[size])
            _steps(clients, setup, plan, steps, progress)
    if 1 in plan.batches:
        report.row("decode", "batch 1", "tokens/s", decode, draw=True)
    for size in plan.prefills:
        report.row("prefill", f"{size} tokens", "tokens/s", kept[size], draw=True)
        report.row("prefill, cache just erased", f"{size} tokens", "tokens/s", fresh[size], draw=True)
    report.notes.append(
        "prefill: pages that an earlier prompt used are still there; cache just erased: every page is mapped anew"
    )
    _show_steps(report, steps)


def _prefill(clients: Sequence[Client], size: int, rounds: int, kept: Values, fresh: Values) -> None:
    for one in clients:
        one.complete(prompt(size, 99), 1, cached=False)
    for number, one in _turns(clients, rounds):
        answer = one.complete(prompt(size, 100 + number), 1, cached=False)
        kept[one.side.name].append(answer.prompt_n * 1000.0 / answer.prompt_ms)
    for number, one in _turns(clients, rounds):
        one.erase()
        answer = one.complete(prompt(size, 200 + number), 1, cached=False)
        fresh[one.side.name].append(answer.prompt_n * 1000.0 / answer.prompt_ms)


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

    def add(self, first: int, found: Sequence[float], page: int) -> None:
        """`found`: of the steps that decode the tokens at `first`, `first` + 1, ..."""
        for position, value in enumerate(found, first):
            if position % page == 0:
                self.maps.append(value)
            elif position % STEP_CELLS == 0:
                self.reads_more.append(value)
            else:
                self.plain.append(value)


def _steps(
    clients: Sequence[Client], setup: Setup, plan: Plan, found: dict[str, _Steps], progress: Progress
) -> None:
    """Each answer begins a little before a page's end, in a cache that was just erased, and grows over it."""
    page = page_cells(setup, clients)
    # More than half of an answer is beyond the page's end, so that 256 cells' steps that do not map are seen too.
    count = min(STEP_CELLS + 64, plan.context // 4)
    before = 32
    chunks = -(-plan.steps // (count - 1) // plan.starts)
    pages = max(1, min(3, (plan.context - count) // page - 1))
    progress(f"overhead: {chunks} answers of {count} single steps, pages of {page} cells")
    for number, one in _turns(clients, max(1, chunks)):
        length = page * (1 + number % pages) - before
        one.erase()
        answer = one.stream(prompt(length, 300 + number), count, cached=False)
        # The first token comes out of the prompt; the first step decodes it, at the position behind the prompt.
        found[one.side.name].add(length, answer.step_ms, page)


def page_cells(setup: Setup, clients: Sequence[Client]) -> int:
    """Cells from one step of mapping to the next: a page of the K tensor, but at least what is read at once."""
    size = max(one.page_bytes() for one in clients) or 2 << 20
    row = setup.model.shape.row_bytes if setup.model.shape else 2048
    return max(STEP_CELLS, size // row // STEP_CELLS * STEP_CELLS)


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
    report.at_most("p99.9 of a step over stock's", slow, STEP_MS, "ms", f"{len(on.all)} steps a side")
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
