"""Which process a word names, and what processes answer."""

from __future__ import annotations

import dataclasses
import os
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kvpatch.errors import UsageError
from kvpatch.pools import (
    Drivers,
    Ledgers,
    NoPoolsError,
    Ollama,
    RefusedError,
    TargetError,
    Wish,
    files,
    targets,
)
from kvpatch.pools.ledgers import Opened
from kvpatch.runtime import Command, Ledger, Library, Slot
from tests.unit.pools.kit import BUS, MIB, UUID, Start

_BLANK = {field.name: 0 for field in dataclasses.fields(Slot)}


def device(name: str, *slots: tuple[int, int, str]) -> Opened:
    """A ledger with these slots: number, pid, model."""
    rows = tuple(
        Slot(**cast("Any", _BLANK | {"slot": slot, "pid": pid, "name": model, "controlled": pid > 0}))
        for slot, pid, model in slots
    )
    ledger = types.SimpleNamespace(slots=lambda: rows)
    path = Path(f"/dev/shm/kvcached-0-{name}")
    file = files.LedgerFile(path=path, device=name, owner=0, inode=(0, 0), empty=False)
    return Opened(file, cast("Ledger", ledger))


OPENED = (
    device("host", (0, 100, "llama3:latest"), (1, 7, "qwen:8b"), (2, 0, "leased")),
    device(UUID, (0, 100, "llama3:latest"), (3, 300, "qwen:32b"), (4, 400, "llama3.2:latest")),
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [("host", 0), ("host", 1), (UUID, 0), (UUID, 3), (UUID, 4)]),
        (["llama3"], [("host", 0), (UUID, 0)]),  # one process on two devices
        (["llama3.2"], [(UUID, 4)]),
        (["LLAMA3.2"], [(UUID, 4)]),
        (["qwen:3"], [(UUID, 3)]),
        (["100"], [("host", 0), (UUID, 0)]),
        (["pid:7"], [("host", 1)]),
        (["slot:3"], [(UUID, 3)]),
        (["3", "qwen:8b", "300"], [(UUID, 3), ("host", 1)]),
        (["leased"], [("host", 2)]),
    ],
)
def test_words(words: list[str], expected: list[tuple[str, int]]) -> None:
    found = targets.select(OPENED, words, Command.TRIM)
    assert [(target.opened.file.device, target.slot.slot) for target in found] == expected


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("qwen", "more than one process"),
        ("llama", "more than one process"),
        ("mistral", "names no process"),
        ("pid:3", "names no process"),
        ("", "more than one process"),
    ],
)
def test_words_that_name_no_one_process(word: str, says: str) -> None:
    with pytest.raises(TargetError, match=says) as caught:
        targets.select(OPENED, [word], Command.TRIM)
    assert caught.value.hint is not None
    assert "pid" in caught.value.hint


def test_one_device() -> None:
    assert targets.on_device(OPENED, None) == OPENED
    assert targets.on_device(OPENED, "host") == OPENED[:1]
    assert targets.on_device(OPENED, f"GPU-{UUID[:8].upper()}") == OPENED[1:]
    for wrong in ("", "cuda:0"):
        with pytest.raises(UsageError, match="--device"):
            targets.on_device(OPENED, wrong)


@pytest.fixture
def opened(lib: Library, drivers: Drivers, tmp_path: Path) -> Iterator[Ledgers]:
    paths = [tmp_path / "ledger", tmp_path / f"ledger.{BUS}"]
    for path in paths:
        Ledger(path, library=lib).close()
    ledgers = Ledgers(lambda: files.find(paths), lib, drivers)
    yield ledgers
    ledgers.close()


def carry_out(
    opened: Ledgers, command: Command, *words: str, wait_ms: int = 20_000
) -> tuple[targets.Outcome, ...]:
    return targets.carry_out(targets.select(opened.opened, words, command), command, wait_ms=wait_ms)


def test_processes_do_as_they_are_told(start: Start, opened: Ledgers) -> None:
    process = start("a")
    start("b", group="two")
    (trimmed,) = carry_out(opened, Command.TRIM, "a")
    assert (trimmed.pid, trimmed.name, trimmed.freed, trimmed.error) == (process.pid, "a", 8192, "")
    slept = carry_out(opened, Command.SLEEP)
    assert [outcome.freed for outcome in slept] == [4 * MIB + 16384, 4 * MIB + 24576]
    assert [pool.state for pool in opened.look().pools] == ["asleep", "asleep"]
    targets.require_done(carry_out(opened, Command.WAKE, "a"))
    assert [pool.state for pool in opened.look().pools] == ["awake", "asleep"]
    assert process.ask("read") == "kept"


def test_a_busy_process_does_not_keep_the_others(start: Start, opened: Ledgers) -> None:
    busy = start("busy")
    start("idle")
    busy.ask("enter")
    outcomes = carry_out(opened, Command.SLEEP)
    assert [(o.name, o.error) for o in outcomes] == [("busy", "KVCACHED_E_BUSY"), ("idle", "")]
    with pytest.raises(RefusedError, match=r"cannot sleep \(1 of 2 did it\): busy") as caught:
        targets.require_done(outcomes)
    assert caught.value.hint == "it is in use: try again when it is idle"
    assert [row["error"] for row in caught.value.data["outcomes"]] == ["KVCACHED_E_BUSY", ""]
    busy.ask("leave")
    targets.require_done(carry_out(opened, Command.SLEEP, "busy"))


def test_no_room_to_wake(start: Start, opened: Ledgers) -> None:
    start()
    carry_out(opened, Command.SLEEP)
    opened.opened[0].ledger.set_limit("one", MIB)
    (outcome,) = carry_out(opened, Command.WAKE)
    assert outcome.error == "KVCACHED_E_LIMIT"
    assert "kvpatch limit" in outcome.hint


def test_processes_that_cannot_answer(start: Start, opened: Ledgers) -> None:
    process = start()
    (target,) = targets.select(opened.opened, [], Command.TRIM)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # until all of its threads have stopped
    (outcome,) = targets.carry_out([target], Command.TRIM, wait_ms=50)
    assert outcome.error == "KVCACHED_E_TIMEOUT"
    assert "--wait" in outcome.hint
    process.end()
    (outcome,) = targets.carry_out([target], Command.TRIM, wait_ms=5000)
    assert outcome.error == "KVCACHED_E_SLOT"
    assert "kvpatch top" in outcome.hint
    opened.opened[0].ledger.lease("one", "to come", MIB)
    with pytest.raises(NoPoolsError, match="no process that could trim"):
        targets.select(opened.opened, [], Command.TRIM)


def set_limit(
    opened: Ledgers, group: str | None, limit: int | None, **card: bool
) -> list[tuple[str, Any, Any]]:
    done = targets.set_limit(opened.opened, group, limit, card=card.get("card", False))
    return [(one.device, one.group, one.limit) for one in done]


def test_limits(start: Start, opened: Ledgers, tmp_path: Path) -> None:
    with pytest.raises(NoPoolsError, match="no group has a process"):
        set_limit(opened, None, MIB)
    start("a")
    assert set_limit(opened, None, 64 * MIB) == [("host", "one", 64 * MIB)]
    (low,) = targets.set_limit(opened.opened, "one", MIB, card=False)
    assert (low.limit, low.charge - low.overage) == (MIB, MIB)
    assert set_limit(opened, "one", None) == [("host", "one", None)]
    start("b", ledger=tmp_path / f"ledger.{BUS}")
    assert set_limit(opened, None, 64 * MIB) == [(BUS, "one", 64 * MIB)]  # memory beside GPUs has none
    start("c", group="two")
    with pytest.raises(TargetError, match="2 groups: one, two"):
        set_limit(opened, None, MIB)
    with pytest.raises(TargetError, match="no process is in group 'three'"):
        set_limit(opened, "three", MIB)
    assert set_limit(opened, None, 512 * MIB, card=True) == [(BUS, None, 512 * MIB)]
    assert opened.look().devices[1].limit == 512 * MIB


def test_a_limit_of_the_last_revision(start: Start, opened: Ledgers) -> None:
    start()
    opened.opened[0].ledger.set_limit("one", MIB, revision=2**32 - 1)
    with pytest.raises(RefusedError, match="stays as it was"):
        set_limit(opened, "one", 2 * MIB)


def test_an_ollama_only_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, wish = Ollama("box:81"), Wish(command="limit")
    monkeypatch.setattr(files, "find", lambda: ())
    assert "takes no limit" in targets.only_shown(shown, wish).message
    stranger = files.LedgerFile(
        path=Path("/dev/shm/kvcached-1-host"),
        device="host",
        owner=os.geteuid() + 1,
        inode=(0, 0),
        empty=False,
    )
    monkeypatch.setattr(files, "find", lambda: (stranger,))
    assert "kvpatch limit" in str(targets.only_shown(shown, wish).hint)
