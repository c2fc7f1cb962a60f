"""The same tokens and log-probabilities as stock at one slot, whatever happens to the memory in between: growth, trims,
sleep and wake, exhaustion, save and restore, context shift. At one slot the schedule of batches is fixed, so that
equality is to the last digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.llama_pair import ONE, PATCHED, STEP, STOCK, Pair, Side

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]

# model, flash attention, type of K, type of V (upstream wants flash attention for a quantised V)
CONFIGS = [
    ("llama", "on", "f16", "f16"),
    ("llama", "off", "f16", "f16"),
    ("llama", "on", "q8_0", "q8_0"),
    ("llama", "off", "q8_0", "f16"),
    ("llama", "on", "q4_0", "q4_0"),
    ("llama", "off", "q4_0", "f16"),
    ("swa", "on", "f16", "f16"),
    ("swa", "off", "f16", "f16"),
    ("swa", "on", "q8_0", "q8_0"),
    ("swa", "on", "q4_0", "q4_0"),
]
CELLS = 4096
TOO_LONG = 3500


def everything(side: Side) -> list[Any]:
    """One conversation, and all that can happen to its memory. Stock does the same, but for what it has no name for."""
    answers: list[Any] = []

    def ask(prompt: int, salt: int, answer: int) -> None:
        answers.append(side.ask(prompt, salt, answer))

    ask(20, 1, 16)
    ask(300, 1, 40)
    side.sleep()
    ask(340, 1, 24)
    side.do("trim")
    ask(900, 1, 24)
    side.sleep()
    side.do("wake")
    ask(910, 1, 24)
    # A slot that is saved asleep, and one restored into a sleeping cache.
    side.sleep()
    side.slot(0, "save", "asleep")
    answers.append(side.saved("asleep"))
    side.slot(0, "save", "awake")
    answers.append(side.saved("awake"))
    side.slot(0, "erase")
    ask(120, 2, 24)
    side.sleep()
    side.slot(0, "restore", "asleep")
    ask(930, 1, 24)
    # Exhaustion: refused here, never asked of stock, which has no limit.
    if side.elastic:
        assert side.ask(TOO_LONG, 9, 4) == 503
    side.slot(0, "erase")
    side.do("trim")
    if side.elastic:
        assert side.mapped() == 0
    ask(300, 1, 40)
    ask(1100, 3, 24)
    return answers


@pytest.mark.parametrize(("model", "flash", "k", "v"), CONFIGS)
def test_one_slot_is_equal_to_stock(pair: Pair, model: str, flash: str, k: str, v: str) -> None:
    words = ("-c", str(CELLS), "-fa", flash, "-ctk", k, "-ctv", v, "-b", "512", *ONE)
    limit = pair.charged_at_start(words, model=model) + room(pair, words, model)
    log = pair.equal(words, everything, model=model, KVCACHED_LIMIT=str(limit))
    assert "KVCACHED_E_LIMIT" in log


def room(pair: Pair, words: tuple[str, ...], model: str) -> int:
    """KV bytes that let a prompt of 1,100 tokens in, and not one of TOO_LONG: half-way between what the two take."""

    def measure(side: Side) -> tuple[int, int]:
        start = side.held().charge
        side.ask(1124, 3, 1)
        short = side.held().charge
        side.ask(TOO_LONG, 9, 1)
        return short - start, side.held().charge - start

    (short, long), _ = pair.run(PATCHED, words, measure, model=model)
    assert short < long
    return (short + long) // 2


@pytest.mark.parametrize(("flash", "kind"), [("on", "f16"), ("off", "f16"), ("on", "q8_0")])
def test_a_shifted_context_sleeps_and_goes_on(pair: Pair, flash: str, kind: str) -> None:
    def scenario(side: Side) -> Any:
        answers = [side.ask(300, 1, 400)]
        side.sleep()
        answers.append(side.ask(310, 1, 300))
        side.do("trim")
        return [*answers, side.ask(50, 4, 40)]

    words = ("-c", "512", "-fa", flash, "-ctk", kind, "-ctv", kind, "--context-shift", *ONE)
    log = pair.equal(words, scenario, model="heads of 64" if kind == "q8_0" else "llama")
    assert log.count("slot context shift") >= 2


def test_a_follow_up_after_sleep_processes_only_what_is_new(pair: Pair) -> None:
    def scenario(side: Side) -> Any:
        first = side.ask(1000, 1, 8)
        side.sleep()
        return first, side.ask(1010, 1, 8)

    words = ("-c", str(CELLS), "-fa", "on", *ONE)
    (_, second), _ = pair.both(words, scenario)
    assert second[2] <= 10


def test_switched_off_a_patched_server_is_a_stock_one(pair: Pair) -> None:
    def scenario(side: Side) -> Any:
        maps = Path(f"/proc/{side.server.pid}/maps").read_text(encoding="utf-8", errors="replace")
        return [side.ask(300, 1, 24), side.ask(700, 2, 24)], "libkvcached" in maps

    words = ("-c", str(CELLS), "-fa", "off", *ONE)
    expected, _ = pair.run(STOCK, words, scenario)
    value, log = pair.run(PATCHED, words, scenario, OLLAMA_KVCACHED_ENABLED="false")
    assert value == expected
    assert value[1] is False
    assert "kvcached: " not in log


def test_pages_follow_the_prompt(pair: Pair) -> None:
    """What is mapped is what is read, and at most one step ahead of it."""

    def scenario(side: Side) -> list[int]:
        side.ask(600, 1, 8)
        return [side.mapped()]

    (mapped,), _ = pair.run(PATCHED, ("-c", "8192", "-fa", "on", *ONE), scenario)
    assert 3 * STEP <= mapped <= 4 * STEP
