"""Calls by which libkvcached takes memory and gives it back (mmap, mprotect, madvise) fail under a running server:
it lives on, answers right or 503, and once calls succeed again everything is as before, by the ledger and by the
kernel.

tests/faults/failing_calls.c is preloaded and makes them fail."""

from __future__ import annotations

import errno
import mmap
import struct
import subprocess
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from kvpatch.smoke.holdings import Holdings
from tests.conftest import REPO
from tests.integration.llama_pair import ONE, PATCHED, STOCK, Pair, Side

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]

WORDS = ("-c", "4096", "-fa", "on", "-b", "512", *ONE)
MOST = 24  # places of one call in one operation that are made to fail; of more, the first and the last


class Call(IntEnum):
    """As in failing_calls.c."""

    MMAP = 0
    MPROTECT = 1
    MADVISE = 2


class Faults:
    """The page that the preloaded library reads its schedules from."""

    _FORMAT = struct.Struct("=IIIIi")  # calls, failures, countdown, again, error

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(4096))
        self._file = path.open("r+b")
        self._page = mmap.mmap(self._file.fileno(), 4096)

    def _row(self, call: Call) -> tuple[int, ...]:
        return self._FORMAT.unpack_from(self._page, call * self._FORMAT.size)

    def set(self, call: Call, nth: int, *, again: int = 0) -> None:
        """The nth call from now on fails, and then every `again`-th."""
        at = call * self._FORMAT.size
        # The countdown last: it is what arms the schedule.
        struct.pack_into("=Ii", self._page, at + 12, again, errno.ENOMEM)
        struct.pack_into("=I", self._page, at + 8, nth)

    def clear(self) -> None:
        for call in Call:
            struct.pack_into("=I", self._page, call * self._FORMAT.size + 12, 0)
            struct.pack_into("=I", self._page, call * self._FORMAT.size + 8, 0)

    def calls(self, call: Call) -> int:
        return self._row(call)[0]

    def failures(self, call: Call) -> int:
        return self._row(call)[1]

    def close(self) -> None:
        self._page.close()
        self._file.close()


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("faults") / "failing_calls.so"
    source = REPO / "tests" / "faults" / "failing_calls.c"
    flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run(["cc", *flags, "-o", target, source, "-ldl"], check=True)
    return target


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    page = Faults(tmp_path / "schedules")
    yield page
    page.close()


def env(tmp_path: Path, shim: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(shim),
        "FAILING_CALLS": str(tmp_path / "schedules"),
        "FAILING_CALLS_OF": "libkvcached.so",
    }


def grow(side: Side) -> Any:
    return side.ask(700, 1, 16)


def sleep(side: Side) -> Any:
    """What was mapped by the last answer sleeps; refusing to is no fault."""
    return command(side, "sleep")


def wake(side: Side) -> Any:
    """A request wakes it."""
    return side.ask(720, 1, 16)


def trim(side: Side) -> Any:
    side.slot(0, "erase")
    return command(side, "trim")


def command(side: Side, action: str) -> Any:
    """200, or the status of a refusal. Stock answers nothing else than 200 to it."""
    if not side.elastic:
        return 200
    return side.server.request("POST", f"/kvcached/{action}", json={}).status_code


# In this order they make a life of a slot's memory.
OPERATIONS: tuple[Callable[[Side], Any], ...] = (grow, sleep, wake, trim)
COMMANDS = (sleep, trim)


def clean(side: Side) -> Holdings:
    """Nothing in the slot, nothing idle, everything awake."""
    side.slot(0, "erase")
    side.do("wake")
    side.do("trim")
    return side.held()


def life(side: Side) -> list[Any]:
    return [operation(side) for operation in OPERATIONS]


@pytest.mark.parametrize("call", [Call.MPROTECT, Call.MADVISE])
def test_each_failing_call_costs_one_answer_at_most(
    pair: Pair, tmp_path: Path, shim: Path, faults: Faults, call: Call
) -> None:
    (expected, follow_up), _ = pair.run(STOCK, WORDS, lambda side: (life(side), side.ask(250, 2, 12)))
    tried: list[tuple[str, int, Any]] = []

    def scenario(side: Side) -> None:
        assert life(side) == expected
        before = clean(side)
        for number, operation in enumerate(OPERATIONS):
            for earlier in OPERATIONS[:number]:
                earlier(side)
            begun = faults.calls(call)
            operation(side)
            places = faults.calls(call) - begun
            wanted = range(1, places + 1)
            for nth in wanted if places <= MOST else (*wanted[: MOST // 2], *wanted[-MOST // 2 :]):
                clean(side)
                for earlier in OPERATIONS[:number]:
                    earlier(side)
                failures = faults.failures(call)
                faults.set(call, nth)
                answer = operation(side)
                faults.clear()
                if faults.failures(call) == failures:
                    continue  # another thread of the library has less to do this time
                tried.append((operation.__name__, nth, answer if isinstance(answer, int) else 200))
                if operation in COMMANDS:
                    assert isinstance(answer, int)
                else:
                    assert answer in (expected[number], 503), (operation.__name__, nth, answer)
                now = clean(side)
                assert (now.kv, now.weights, now.compute) == (before.kv, before.weights, before.compute), (
                    tried[-1]
                )
                assert (now.charge, now.asleep) == (before.charge, 0), tried[-1]
                assert side.ask(250, 2, 12) == follow_up, tried[-1]

    pair.run(PATCHED, WORDS, scenario, **env(tmp_path, shim))
    assert {name for name, _, _ in tried} == {operation.__name__ for operation in OPERATIONS}


def test_no_host_memory_for_a_sleep(pair: Pair, tmp_path: Path, shim: Path, faults: Faults) -> None:
    """A sleep of more than slept before needs host memory. Without it nothing sleeps and nothing is lost."""
    lengths = (100, 900, 1800, 3000)
    statuses: list[int] = []

    def stock(side: Side) -> list[Any]:
        return [side.ask(length, 1, 8) for length in lengths]

    expected, _ = pair.run(STOCK, WORDS, stock)

    def scenario(side: Side) -> None:
        for length, answer in zip(lengths, expected, strict=True):
            assert side.ask(length, 1, 8) == answer
            before = side.held()
            faults.set(Call.MMAP, 1, again=1)
            statuses.append(command(side, "sleep"))
            faults.clear()
            if statuses[-1] != 200:
                now = side.held()
                assert (now.weights, now.compute, now.asleep) == (before.weights, before.compute, 0)
                assert now.kv >= before.kv - before.idle
                side.sleep()
            assert side.held().asleep > 0

    pair.run(PATCHED, WORDS, scenario, **env(tmp_path, shim))
    assert faults.failures(Call.MMAP) > 0
    assert any(status != 200 for status in statuses), statuses


@pytest.mark.parametrize(("again", "status"), [(3, 503), (7, 503), (61, 200)])
@pytest.mark.parametrize("call", [Call.MPROTECT, Call.MADVISE])
def test_calls_that_keep_failing(
    pair: Pair, tmp_path: Path, shim: Path, faults: Faults, call: Call, again: int, status: int
) -> None:
    """Many in a row. A growth is one call over all tensors of a buffer, all or none: with every third or seventh
    failing none gets through, with every 61st it does, at the second try. A decode that found no room is tried
    again in smaller batches, so that log-probabilities of answers meanwhile may differ in rounding; those after are
    equal, and the figures as before."""
    prompts = [(60 + 90 * number % 1000, 10 + number % 5, 8) for number in range(16)]

    def stock(side: Side) -> list[Any]:
        answers = []
        for prompt in prompts:
            side.slot(0, "erase")
            answers.append(side.ask(*prompt))
        return answers

    expected, _ = pair.run(STOCK, WORDS, stock)
    statuses: list[int] = []

    def scenario(side: Side) -> None:
        before = clean(side)
        for number, prompt in enumerate(prompts):
            faults.set(call, 1 + 7 * number % again, again=again)
            side.slot(0, "erase")
            answer = side.ask(*prompt)
            command(side, ("sleep", "trim")[number % 2])
            faults.clear()
            statuses.append(answer if isinstance(answer, int) else 200)
            if answer != 503:
                assert answer[0] == expected[number][0], number
                assert answer[1] == pytest.approx(expected[number][1], abs=0.05), number
            side.slot(0, "erase")
            assert side.ask(*prompt) == expected[number], number
        now = clean(side)
        assert (now.kv, now.weights, now.compute) == (before.kv, before.weights, before.compute)
        assert now.charge == before.charge

    pair.run(PATCHED, WORDS, scenario, **env(tmp_path, shim))
    assert faults.failures(call) > len(prompts) // 2
    assert set(statuses) == {status}
