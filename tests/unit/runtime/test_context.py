"""Contexts and their regions over the real library on the host backend."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from kvpatch.errors import UsageError
from kvpatch.runtime import (
    CallError,
    Command,
    Context,
    Event,
    Kind,
    Ledger,
    Library,
    LogLevel,
    Options,
    Stats,
)

MIB = 1 << 20


def test_a_round_trip(context: Context) -> None:
    assert context.page_size == 4096
    with context.reserve(100 * MIB) as region:
        assert (region.size, region.page_size, region.kind) == (100 * MIB, 4096, Kind.KV)
        assert region.base % 4096 == 0
        with context.gate(), context.gate():
            region.ensure(0, 3 * 4096)
            region.write(4000, b"across a page's end" * 10)
            assert region.read(4000, 19) == b"across a page's end"
            assert region.read(50 * MIB, 3) == b"\0\0\0"
            assert ctypes.string_at(region.base + 4000, 6) == b"across"
        assert region.mapped_run(0, region.size) == (3 * 4096, True)
        assert region.mapped_run(3 * 4096, MIB) == (MIB, False)
        region.clear(4000, 6)
        assert region.read(4000, 8) == b"\0\0\0\0\0\0 a"
        region.release(0, 4096)
        stats = context.stats()
        assert (stats.mapped, stats.idle, stats.kind_mapped) == (3 * 4096, 4096, (3 * 4096, 0, 0))
        assert (stats.limit, stats.host_limit, stats.group_charge) == (64 * MIB, None, 3 * 4096)
        assert region.stats().ensures == 1
        assert context.trim() == 4096
        assert context.stats().mapped == 2 * 4096
    assert context.stats().reserved == 0


def test_allocations_and_figures_of_the_device(context: Context) -> None:
    address = context.alloc(10_000)
    assert ctypes.string_at(address, 10_000) == bytes(10_000)
    free, total = context.device_memory()
    assert 0 < free <= total
    assert context.available() <= 64 * MIB
    context.free(address)
    with pytest.raises(CallError, match=r"cannot allocate 68719476736 bytes: failed \(.+\)") as caught:
        context.alloc(1 << 36)
    assert caught.value.name == ""


def test_an_error_has_name_sentence_and_detail(context: Context) -> None:
    region = context.reserve(MIB * 100)
    with pytest.raises(CallError) as caught:
        region.ensure(0, 65 * MIB)
    error = caught.value
    assert error.name == "KVCACHED_E_LIMIT"
    assert error.sentence == "the memory limit of the group or of the card leaves no room for this"
    assert re.search(r"\d", error.detail)
    assert (
        error.message == f"cannot ensure 68157440 bytes at 0: {error.name}: {error.sentence} ({error.detail})"
    )
    assert (error.exit_code, error.code) == (10, "library")
    assert error.hint
    assert error.data["error"] == "KVCACHED_E_LIMIT"
    assert context.stats().limit_failures == 1
    assert context.stats().mapped == 0


def test_the_detail_is_that_of_the_thread(context: Context) -> None:
    region = context.reserve(MIB)
    wrong: list[str] = []

    def fail(offset: int) -> None:
        for _ in range(200):
            try:
                region.ensure(offset, 4096)
            except CallError as error:
                if str(offset) not in error.detail:
                    wrong.append(f"{offset}: {error.detail}")
            else:
                wrong.append(f"{offset}: no error")

    threads = [threading.Thread(target=fail, args=(number * 7_000_003,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closed_handles_are_not_used(lib: Library, path: Path) -> None:
    ledger = Ledger(path, library=lib)
    context = Context(Options(ledger=path), library=lib)
    region, other = context.reserve(MIB), context.reserve(MIB)
    other.close()
    other.close()
    for closed in (ledger, context):
        closed.close()
        closed.close()
    region.close()
    with pytest.raises(ValueError, match="closed"):
        ledger.slots()
    for use in (context.stats, region.stats, other.stats):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_dropping_the_last_reference_gives_everything_back(lib: Library, path: Path, ledger: Ledger) -> None:
    context = Context(Options(ledger=path), library=lib)
    region = context.reserve(MIB, Kind.WEIGHTS)
    region.set_reload(lambda region: region.write(0, b"x"))
    region.ensure(0, MIB)
    assert len(ledger.slots()) == 1
    del context, region
    gc.collect()
    assert ledger.slots() == ()


def test_several_ranges_together(lib: Library) -> None:
    with Context(Options(ledger=False, limit=4 * 4096), library=lib) as context:
        region = context.reserve(MIB)
        region.ensure_ranges((page * 4096, 4096) for page in (3, 9, 5))
        assert (context.stats().mapped, context.stats().ensures) == (3 * 4096, 1)
        with pytest.raises(CallError, match="cannot ensure 3 ranges: KVCACHED_E_LIMIT"):
            region.ensure_ranges([(0, 1), (4 * 4096, 1), (9 * 4096, 1)])
        with pytest.raises(CallError, match="cannot ensure 2 ranges: KVCACHED_E_INVAL"):
            region.ensure_ranges([(0, 4096), (MIB, 1)])
        region.ensure_ranges([])
        assert context.stats().mapped == 3 * 4096


def test_several_ranges_ahead(lib: Library) -> None:
    with Context(Options(ledger=False, lookahead="inline"), library=lib) as context:
        region = context.reserve(MIB)
        region.prepare_ranges((page * 4096, 4096) for page in (3, 9, 5))
        assert context.stats().ready == 3 * 4096
        region.prepare_ranges([])
        assert context.stats().ready == 3 * 4096
        with pytest.raises(CallError, match="cannot prepare 2 ranges: KVCACHED_E_INVAL"):
            region.prepare_ranges([(0, 4096), (MIB, 1)])
        with pytest.raises(UsageError, match="length -1 is not between"):
            region.prepare_ranges([(0, -1)])
        assert context.stats().mapped == 3 * 4096


def test_events_arrive(lib: Library, path: Path, ledger: Ledger) -> None:
    heard: list[tuple[Event, Stats]] = []
    refused: list[str] = []

    def event(what: Event, now: Stats) -> None:
        heard.append((what, now))
        try:
            opened.stats()
        except CallError as error:
            refused.append(error.detail)

    with Context(Options(ledger=path, event=event), library=lib) as opened:
        region = opened.reserve(MIB)
        region.ensure(0, 4 * 4096)
        opened.sleep()
        with opened.gate():
            region.release(0, 4096)
        (slot,) = ledger.slots()
        assert ledger.command(slot.slot, Command.TRIM) == 4096
    assert [what for what, _ in heard] == [Event.SLEEPING, Event.SLEPT, Event.WOKE, Event.TRIMMED]
    assert [(now.mapped, now.kind_asleep[0], now.limit) for _, now in heard] == [
        (4 * 4096, 0, None),
        (0, 4 * 4096, None),
        (4 * 4096, 0, None),
        (3 * 4096, 0, None),
    ]
    assert (heard[0][1].last_inside_ns, heard[3][1].last_inside_ns > 0) == (0, True)
    assert len(refused) == 4
    assert all("event function" in detail for detail in refused)


def test_idle_memory_goes_back_by_itself(lib: Library) -> None:
    done = threading.Event()
    options = Options(ledger=False, idle_trim_ms=20, event=lambda what, _now: done.set())
    with Context(options, library=lib) as context:
        region = context.reserve(MIB)
        region.ensure(0, 4 * 4096)
        region.release(0, 4096)
        assert done.wait(10)
        assert context.stats().mapped == 3 * 4096
    with pytest.raises(UsageError, match="idle_trim_ms 4294967296 is not between"):
        Context(Options(idle_trim_ms=1 << 32), library=lib)


def test_log_lines_arrive(lib: Library, path: Path) -> None:
    lines: list[tuple[LogLevel, str]] = []
    options = Options(ledger=path, log=lambda level, text: lines.append((level, text)))
    with Context(options, library=lib) as context:
        context.free(4096)
    assert any(level <= LogLevel.WARN and "0x1000" in text for level, text in lines), lines


# ---- sleep ----


def test_sleep_and_wake(context: Context) -> None:
    kv, weights = context.reserve(8 * MIB), context.reserve(8 * MIB, Kind.WEIGHTS)
    scratch = context.reserve(4 * MIB, Kind.SCRATCH)
    for region in (kv, weights, scratch):
        region.write(12_345, b"content")
    context.prepare_sleep([Kind.WEIGHTS])
    with context.gate(), pytest.raises(CallError) as caught:
        context.sleep(wait_ms=10)
    assert caught.value.name == "KVCACHED_E_BUSY"
    mapped = context.stats().mapped
    assert context.sleep() == mapped
    asleep = context.stats()
    assert (asleep.mapped, asleep.asleep, asleep.sleeps) == (0, mapped, 1)
    assert asleep.host_bytes > 0
    context.wake([Kind.SCRATCH])
    assert context.stats().asleep == mapped - scratch.size // 2
    with context.gate():
        assert context.stats().asleep == 0
        assert (kv.read(12_345, 7), weights.read(12_345, 7)) == (b"content", b"content")
        assert scratch.read(12_345, 7) == bytes(7)
    assert context.trim_host(weights=True) > 0
    assert context.stats().host_bytes == 0


def test_weights_without_room_for_a_copy_are_reloaded(lib: Library, path: Path) -> None:
    with Context(Options(ledger=path, host_limit=0), library=lib) as context:
        weights = context.reserve(2 * MIB, Kind.WEIGHTS)
        weights.write(0, b"first")
        with pytest.raises(CallError) as caught:
            context.sleep()
        assert caught.value.name == "KVCACHED_E_HOST_LIMIT"
        fail = [True]

        def reload(region: Any) -> None:
            if fail[0]:
                raise OSError("the file is gone")
            region.write(0, b"again")

        weights.set_reload(reload)
        context.sleep()
        with pytest.raises(CallError) as caught:
            context.enter()
        assert caught.value.name == "KVCACHED_E_RELOAD"
        assert isinstance(caught.value.__cause__, OSError)
        assert context.stats().asleep == 2 * MIB
        fail.clear()
        fail.append(False)
        with context.gate():
            assert weights.read(0, 5) == b"again"
        weights.set_reload(None)
        with pytest.raises(CallError, match="set the reload function"):
            context.reserve(MIB).set_reload(reload)
