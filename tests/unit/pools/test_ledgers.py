"""Pools by their ledgers: real processes, what is shown of each, and files that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpatch.errors import LibraryError
from kvpatch.pools import DamagedError, DeniedError, Drivers, Ledgers, State, files
from kvpatch.pools.model import state_of
from kvpatch.runtime import Command, Ledger, Library
from tests.unit.pools.kit import BUS, MIB, Start

KIB = 1024
Open = Any


@pytest.fixture
def opened(lib: Library, drivers: Drivers, tmp_path: Path) -> Iterator[Open]:
    """Opens ledgers by their files; tmp_path/"ledger" if none is named."""
    made: list[Ledgers] = []

    def run(*paths: Path) -> Ledgers:
        named = paths or (tmp_path / "ledger",)
        made.append(Ledgers(lambda: files.find(named), lib, drivers))
        return made[-1]

    yield run
    for ledgers in made:
        ledgers.close()


@pytest.mark.parametrize(
    ("expected", "facts"),
    [
        (State.LEASED, {"attached": False}),
        (State.AWAKE, {}),
        (State.AWAKE, {"mapped": 1}),
        (State.BUSY, {"mapped": 1, "inside": 1}),
        (State.ASLEEP, {"asleep": 1}),
        (State.PARTLY, {"asleep": 1, "mapped": 1}),
        (State.WAKING, {"asleep": 1, "inside": 1}),
        (State.WAITING, {"asleep": 1, "waits": True}),
    ],
)
def test_states(expected: State, facts: dict[str, Any]) -> None:
    nothing = {"attached": True, "mapped": 0, "asleep": 0, "waits": False, "inside": 0}
    assert state_of(**(nothing | facts)) is expected


def test_a_process_awake_and_asleep(start: Start, opened: Open) -> None:
    process = start()
    ledgers = opened()
    (device,) = ledgers.look().devices
    (pool,) = device.pools
    assert (pool.name, pool.pid, pool.group, pool.state) == ("model:latest", process.pid, "one", "awake")
    assert (pool.weights_mapped, pool.weights_asleep) == (4 * MIB, 0)
    assert (pool.kv_mapped, pool.kv_reserved, pool.spare) == (24 * KIB, 1 << 30, 8 * KIB)
    assert pool.claim == pool.charge == 4 * MIB + 24 * KIB
    assert (pool.limit, pool.wants, pool.controlled) == (None, 0, True)
    assert pool.last_use_seconds is not None
    assert 0 <= pool.last_use_seconds < 60
    process.ask("enter")
    assert ledgers.look().pools[0].state == "busy"
    process.ask("leave")

    ledgers.opened[0].ledger.command(0, Command.SLEEP, wait_ms=20_000)
    (pool,) = ledgers.look().pools
    assert (pool.state, pool.weights_mapped, pool.kv_mapped) == ("asleep", 0, 0)
    assert (pool.weights_asleep, pool.kv_asleep) == (4 * MIB, 16 * KIB)
    assert pool.host_bytes >= 4 * MIB + 16 * KIB
    assert (pool.claim, pool.charge) == (0, 0)
    assert process.ask("read") == "kept"
    assert ledgers.look().pools[0].state == "partly asleep"


def test_a_device_sums_up(start: Start, opened: Open, lib: Library, tmp_path: Path) -> None:
    start("a")
    start("b", group="two")
    with Ledger(tmp_path / "ledger", library=lib) as lessor:
        lessor.lease("two", "c", 2 * MIB, fixed=MIB, limit=64 * MIB)
        lessor.set_limit(None, 512 * MIB)
        lessor.set_limit("two", 32 * MIB)
        (device,) = opened().look().devices
    assert [pool.state for pool in device.pools] == ["awake", "awake", "leased"]
    one = 4 * MIB + 24 * KIB
    assert (device.id, device.ledger) == ("host", str(tmp_path / "ledger"))
    assert (device.mapped, device.context_bytes, device.charge) == (2 * one, 0, 2 * one + 2 * MIB)
    assert device.held == 2 * one + MIB  # what is not measured counts as it is charged
    assert device.limit == 512 * MIB
    assert [(g.name, g.limit, g.charge) for g in device.groups] == [
        ("one", None, one),
        ("two", 32 * MIB, one + 2 * MIB),
    ]
    told = device.to_json()
    assert (told["ledger_total"], told["held"], told["driver_used"]) == (2 * one, 2 * one + MIB, 100 * KIB)
    assert told["pools"][2]["fixed"] == MIB


def test_ledgers_come_and_go(start: Start, opened: Open, tmp_path: Path) -> None:
    host, gpu = tmp_path / "ledger", tmp_path / f"ledger.{BUS}"
    start()
    ledgers = opened(host, gpu)
    assert [device.id for device in ledgers.look().devices] == ["host"]
    gpu.touch(0o600)
    assert [device.id for device in ledgers.look().devices] == ["host"]  # nobody has filled it in
    assert gpu.stat().st_size == 0  # nor did looking
    process = start("second", ledger=gpu)
    assert [device.id for device in ledgers.look().devices] == ["host", BUS]
    process.end()
    assert [len(device.pools) for device in ledgers.look().devices] == [1, 0]
    host.unlink()
    assert [device.id for device in ledgers.look().devices] == [BUS]


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def newer(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[8:12] = (999).to_bytes(4, "little")
    path.write_bytes(raw)


def other(path: Path) -> None:
    path.write_bytes(b"no ledger" * 8000)


def open_to_all(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (torn, "is damaged"),
        (newer, "of version 999"),
        (other, "not a ledger"),
        (open_to_all, "mode 0644"),
    ],
)
def test_a_file_that_cannot_be_read(
    spoil: Any, says: str, start: Start, opened: Open, lib: Library, tmp_path: Path
) -> None:
    """It does not hide the others, and is an error only where it is all there is."""
    bad = tmp_path / f"ledger.{BUS}"
    Ledger(bad, library=lib).close()
    spoil(bad)
    start()
    view = opened(tmp_path / "ledger", bad).look()
    assert [(device.id, len(device.pools)) for device in view.devices] == [("host", 1), (BUS, 0)]
    problem = view.devices[1].problem
    assert problem is not None
    assert says in problem
    assert f"rm {bad}" in problem

    with pytest.raises(DamagedError, match=says) as caught:
        opened(bad).require_pools()
    assert caught.value.exit_code == 10
    assert caught.value.hint is not None
    assert f"fuser -v {bad}" in caught.value.hint


def test_a_link_is_not_followed(opened: Open, lib: Library, tmp_path: Path) -> None:
    Ledger(tmp_path / "real", library=lib).close()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(LibraryError, match="symbolic link"):
        opened(tmp_path / "link").require_pools()


def test_a_file_of_another_user(
    start: Start, opened: Open, lib: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 4242)
    ledgers = opened()
    assert ledgers.look().devices == ()
    assert "not shown: ledgers of" in ledgers.look().notes[0]
    with pytest.raises(DeniedError, match="belongs to") as caught:
        ledgers.require_pools()
    assert caught.value.hint is not None
    assert "sudo -u" in caught.value.hint
    assert "--by ollama" in caught.value.hint
    assert caught.value.data["uid"] == mine


def test_nobody_is_no_failure(opened: Open, lib: Library, tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger", library=lib).close()
    ledgers = opened()
    ledgers.require_pools()
    assert not ledgers.populated()
    assert ledgers.look().pools == ()
