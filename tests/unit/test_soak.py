"""The soak's schedule and verdict, without a server. The run itself is in tests/integration/test_soak.py."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.soak import verdict
from tests.soak.schedule import Prompt, Request, Schedule
from tests.soak.sides import Answered, Held
from tests.soak.verdict import Evidence, Tally, chance, growth

_PROMPT = Prompt(salt=1, length=100, answer=4)
_OTHER = Prompt(salt=2, length=100, answer=4)


def _answered(
    *tokens: int, whole: bool = True, refused: bool = False, refusals: tuple[str, ...] = ()
) -> Answered:
    return Answered(
        request=Request(prompt=_PROMPT), tokens=tokens, whole=whole, refused=refused, refusals=refusals
    )


def _held(**changes: int) -> Held:
    held = Held(kinds=(0, 1000, 500), claim=1500, host=2000, rss=100 * verdict.MIB, maps=300, files=40)
    kv = changes.pop("kv", 0)
    weights = changes.pop("weights", 1000)
    return replace(held, kinds=(kv, weights, 500), **changes)


def _tally(answers: int, mismatches: int = 0, refusals: int = 0) -> Tally:
    text = {"ended to keep within the memory limit": refusals} if refusals else {}
    return Tally(answers=answers, mismatches=[_PROMPT] * mismatches, refusals=refusals, texts=text)


@pytest.fixture
def evidence() -> Evidence:
    return Evidence(
        name="one",
        limit=5000,
        control=_tally(100, 8),
        patched=_tally(200, 18, 5),
        fresh=_held(),
        held=tuple(_held(answers=25 * n) for n in range(8)),
        control_held=tuple(_held(answers=25 * n) for n in range(4)),
        alone=22,
        unasked=0,
        differ_alone=(),
        slept=10**6,
        counts={"trim": 3, "sleep": 4, "wake": 5},
        slots_left=0,
    )


def test_a_good_one_passes(evidence: Evidence) -> None:
    assert verdict.problems(evidence) == []
    assert verdict.provoked([evidence]) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patched": _tally(200, 60, 5)}, "60 of 200 answers differ"),
        ({"patched": _tally(0)}, "too little was asked"),
        ({"alone": 0}, "too little was asked"),
        ({"unasked": 2}, "to ask 2 prompts alone"),
        ({"differ_alone": (_OTHER,)}, "differ even alone"),
        ({"control": replace(_tally(100, 8), refusals=1)}, "the stock server refused"),
        ({"patched": replace(_tally(200, 18, 1), texts={"no": 1})}, "does not name the limit"),
        ({"held": (_held(), _held(kv=4096))}, "KV memory is left"),
        ({"held": (_held(), _held(weights=2000))}, "weights and compute"),
        ({"held": (_held(), _held(claim=1501))}, "are charged after"),
        ({"held": (_held(), _held(host=5001))}, "are kept for sleeping"),
        ({"held": tuple(_held(rss=n * 20 * verdict.MIB) for n in range(8))}, "rss grew"),
        ({"held": tuple(_held(maps=n * 100) for n in range(8))}, "maps grew"),
        ({"held": tuple(_held(files=n * 10) for n in range(8))}, "files grew"),
        ({"slots_left": 1}, "left in the ledger"),
    ],
)
def test_each_fault_is_named(evidence: Evidence, changes: dict[str, object], says: str) -> None:
    found = verdict.problems(replace(evidence, **changes))  # type: ignore[arg-type]
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"counts": {"trim": 1, "wake": 1}}, "told to sleep"),
        ({"slept": 0}, "gave anything back"),
        ({"patched": _tally(200, 18)}, "it was not tight"),
    ],
)
def test_a_soak_that_provoked_nothing_shows_nothing(
    evidence: Evidence, changes: dict[str, object], says: str
) -> None:
    (found,) = verdict.provoked([replace(evidence, **changes)])  # type: ignore[arg-type]
    assert says in found


def test_answers_are_counted() -> None:
    tally = Tally()
    expected = _answered(1, 2, 3, 4)
    tally.add(_answered(1, 2, 3, 4), expected)
    tally.add(_answered(1, 2, whole=False), expected)
    tally.add(_answered(1, 3, whole=False), expected)
    tally.add(_answered(1, 2), expected)
    tally.add(_answered(refused=True, refusals=("limit", "limit")), expected)
    assert (tally.answers, len(tally.mismatches), tally.dropped, tally.refusals) == (4, 2, 2, 2)
    assert tally.refused == [_PROMPT]
    assert tally.texts == {"limit": 2}
    assert tally.rate == 0.5


def test_chance() -> None:
    assert chance(0, 50, 0, 50) == 1.0
    assert chance(5, 100, 5, 100) > 0.5
    assert chance(0, 10, 1, 10) == pytest.approx(0.5)
    assert chance(2, 100, 20, 100) < 1e-4
    # As many, of as many: what falls on the second is at least none.
    assert chance(3, 10, 0, 10) == pytest.approx(1.0)


def test_growth_leaves_the_start_out() -> None:
    assert growth([0, 10, 10, 10, 10]) == 0
    assert growth([5, 10, 10, 10, 20, 20, 20]) == 10
    with pytest.raises(ValueError, match="3 readings, at least 4"):
        growth([5, 10, 10])


def test_stock_is_measured_by_as_many_answers(evidence: Evidence) -> None:
    """Stock that grows by 20 MiB in 40 answers allows 40 MiB and the slack in 80, and no more."""
    stock = tuple(_held(rss=(100 + n * 5) * verdict.MIB, answers=n * 10) for n in range(8))
    ours = tuple(_held(rss=(100 + n * 10) * verdict.MIB, answers=n * 20) for n in range(8))
    assert verdict.problems(replace(evidence, held=ours, control_held=stock)) == []
    more = tuple(_held(rss=(100 + n * 13) * verdict.MIB, answers=n * 20) for n in range(8))
    assert "rss grew" in " ".join(verdict.problems(replace(evidence, held=more, control_held=stock)))
    (rss, *_) = verdict.grown(more, stock)
    assert (rss.ours, rss.stock, rss.per) == (65 * verdict.MIB, 25 * verdict.MIB, 2.0)
    assert verdict.grown(more, stock[:3]) == ()


def test_a_schedule_is_made_by_its_seed() -> None:
    def rounds(seed: int) -> list[object]:
        schedule = Schedule(random.Random(seed), slots=3, longest=500, answer=20)
        return [schedule.next() for _ in range(40)]

    assert rounds(1) == rounds(1)
    assert rounds(1) != rounds(2)
    made = rounds(3)
    requests = [r for round_ in made for client in round_.clients for r in client]  # type: ignore[attr-defined]
    assert {r.after for r in requests} == {"", "drop", "reload"}
    assert all(1 <= r.prompt.length <= 500 and r.prompt.answer <= 20 for r in requests)
    salts = [r.prompt.salt for r in requests]
    assert len(set(salts)) < len({(r.prompt.salt, r.prompt.length) for r in requests}), (
        "no conversation goes on"
    )
    steps = [s.action for round_ in made for s in round_.steps]  # type: ignore[attr-defined]
    assert set(steps) == {"trim", "sleep", "wake", "erase"}
    assert all(len(round_.clients) == 3 for round_ in made)  # type: ignore[attr-defined]
    assert {bool(round_.pinned) for round_ in made} == {True, False}  # type: ignore[attr-defined]
