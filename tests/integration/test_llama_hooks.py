"""The hooks beyond what smoke covers (one slot): several slots, cache types, save and restore, stream copies, shifts
that need other slots' pages, and limits reached half-way. Stock answers are the reference, log-probabilities included.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.llama_pair import ONE, PATCHED, SLOTS, SPLIT, STEP, STOCK, Pair, Scenario, Side

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]


def grow_shrink_restore(slots: str) -> Scenario:
    def scenario(side: Side) -> Any:
        answers = [side.ask(20, 1, 16), side.ask(300, 2, 24), side.ask(900, 3, 24)]
        answers += [side.ask(930, 3, 24), side.ask(40, 4, 16)]
        last = 0
        if slots != "one":
            answers += [side.ask(500, 6, 16, 1), side.ask(100, 7, 16, 3), side.ask(600, 8, 16, 2)]
            last = 1
        answers.append(side.ask(700, 5, 24, last))
        side.slot(last, "save", "kept")
        side.slot(last, "erase")
        side.slot(0, "restore", "kept")
        answers.append(side.ask(730, 5, 24, 0))
        return answers

    return scenario


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("model", "flash", "kind"),
    [
        ("llama", "on", "f16"),
        ("llama", "off", "f16"),
        ("llama", "on", "q8_0"),
        ("llama", "on", "q4_0"),
        ("swa", "on", "f16"),
        ("swa", "off", "f16"),
    ],
)
def test_answers_equal_stock(pair: Pair, model: str, flash: str, kind: str, slots: str) -> None:
    words = (
        "-c",
        "8192" if slots == "split" else "4096",
        "-fa",
        flash,
        "-ctk",
        kind,
        "-ctv",
        kind,
        *SLOTS[slots],
    )
    pair.equal(words, grow_shrink_restore(slots), model=model)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(("flash", "kind"), [("on", "f16"), ("off", "f16"), ("on", "q8_0")])
def test_context_shift_and_stream_copies(pair: Pair, flash: str, kind: str, slots: str) -> None:
    def scenario(side: Side) -> Any:
        answers = [side.ask(300, 1, 400)]
        if slots == "split":
            answers += [side.ask(100, 2, 20, 2), side.ask(400, 3, 200, 1), side.ask(105, 2, 20, 2)]
            answers += [side.branch(200, 5, 3), side.branch(40, 6, 2)]
        return [*answers, side.ask(50, 4, 40)]

    words = (
        "-c",
        "2048" if slots == "split" else "512",
        "-fa",
        flash,
        "-ctk",
        kind,
        "-ctv",
        kind,
        "--context-shift",
    )
    log = pair.equal((*words, *SLOTS[slots]), scenario, model="heads of 64" if kind == "q8_0" else "llama")
    assert log.count("slot context shift") >= 1


def test_a_prompt_beyond_the_limit_is_refused_and_leaves_nothing(pair: Pair) -> None:
    words = ("-c", "4096", "-fa", "on", "-b", "512", *ONE)
    figures: list[int] = []

    def scenario(side: Side) -> Any:
        first = side.ask(300, 1, 24)
        too_much = side.ask(1500, 9, 1)
        if side.elastic:
            figures.append(side.mapped())
        return first, too_much, side.ask(400, 2, 24), side.ask(300, 1, 24)

    limit = pair.charged_at_start(words) + 4 * STEP
    (first, _, second, third), _ = pair.run(STOCK, words, scenario)
    value, log = pair.run(PATCHED, words, scenario, KVCACHED_LIMIT=str(limit))
    assert value == (first, 503, second, third)
    assert figures == [0]
    assert "KVCACHED_E_LIMIT" in log


@pytest.mark.parametrize(("flash", "steps"), [("on", 3.5), ("off", 4.3)])
def test_a_shift_needs_no_room_beyond_its_cells(pair: Pair, flash: str, steps: float) -> None:
    """K of all four slots would be four steps more."""
    words = ("-c", "2048", "-fa", flash, "--context-shift", *SPLIT)

    def scenario(side: Side) -> Any:
        answers = [side.ask(100, 1, 20), side.ask(300, 2, 100, 1)]
        side.slot(1, "erase")
        return [*answers, side.ask(300, 3, 400), side.ask(100, 1, 20), side.ask(300, 2, 100, 1)]

    limit = pair.charged_at_start(words) + int(steps * STEP)
    expected, _ = pair.run(STOCK, words, scenario)
    value, log = pair.run(PATCHED, words, scenario, KVCACHED_LIMIT=str(limit))
    assert value == expected
    assert log.count("slot context shift") >= 1


def test_an_erased_slot_gives_its_pages_back_beside_others(pair: Pair) -> None:
    def scenario(side: Side) -> list[int]:
        side.ask(200, 1, 8, 0)
        side.ask(900, 2, 8, 1)
        both = side.mapped()
        side.slot(1, "erase")
        one = side.mapped()
        side.slot(0, "erase")
        return [both, one, side.mapped()]

    (both, one, none), _ = pair.run(PATCHED, ("-c", "8192", "-fa", "on", *SPLIT), scenario)
    # What was mapped ahead of need comes on top.
    assert 5 * STEP <= both <= 7 * STEP
    assert (one, none) == (STEP, 0)
