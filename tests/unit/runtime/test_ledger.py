"""The ledger: slots, leases, limits and commands to other processes."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvpatch.errors import UsageError
from kvpatch.runtime import (
    CallError,
    Command,
    Context,
    Ledger,
    Library,
    LimitResult,
    Options,
    Slot,
)

MIB = 1 << 20


def test_the_default_path(lib: Library) -> None:
    uuid = "GPU-8f1e4c2a-0b5d-4e3f-9a6b-7c8d9e0f1a2b"
    assert re.fullmatch(r"/dev/shm/kvcached-\d+-host", str(Ledger.default_path(library=lib)))
    assert uuid.removeprefix("GPU-") in str(Ledger.default_path(uuid, library=lib))
    with pytest.raises(CallError) as caught:
        Ledger.default_path("../x", library=lib)
    assert caught.value.name == "KVCACHED_E_INVAL"


def test_slots_show_who_holds_what(ledger: Ledger, context: Context) -> None:
    context.reserve(8 * MIB).ensure(0, 8192)
    context.set_queued(3)
    with context.gate():
        (slot,) = ledger.slots()
    assert (slot.name, slot.group, slot.pid > 0) == ("model.gguf", "one", True)
    assert (slot.claim, slot.charge, slot.reserved) == (8192, 8192, 8 * MIB)
    assert (slot.leased, slot.attached, slot.controlled) == (False, True, True)
    assert (slot.inside, slot.queued, slot.kind_bytes) == (1, 3, (8192, 0, 0))
    assert slot.last_use_ns > 0


def test_more_slots_than_fit_at_first(ledger: Ledger) -> None:
    leased = [ledger.lease("many", f"child {number}", 4096) for number in range(40)]
    assert [slot.slot for slot in ledger.slots()] == sorted(leased)
    ledger.unlease(leased[0])
    assert len(ledger.slots()) == 39
    with pytest.raises(CallError) as caught:
        ledger.unlease(leased[0])
    assert caught.value.name == "KVCACHED_E_SLOT"


def test_a_lease_is_used_up_by_its_child(lib: Library, ledger: Ledger, path: Path) -> None:
    slot = ledger.lease("one", "model", 2 * MIB, fixed=MIB, limit=3 * MIB)
    with pytest.raises(CallError, match="KVCACHED_E_LIMIT"):
        ledger.lease("one", "other", 2 * MIB, limit=3 * MIB)
    with Context(Options(ledger=path, slot=slot, limit=3 * MIB), library=lib) as context:
        context.reserve(8 * MIB).ensure(0, 2 * MIB)
        (row,) = ledger.slots()
        assert (row.leased, row.attached, row.group) == (True, True, "one")
        assert (row.lease, row.fixed, row.claim, row.charge) == (2 * MIB, MIB, 2 * MIB, 3 * MIB)
        with pytest.raises(
            CallError, match=r"cannot be charged 1048577 bytes held elsewhere: KVCACHED_E_LIMIT"
        ):
            context.set_fixed(MIB + 1)
        context.set_fixed(4096)
        (row,) = ledger.slots()
        assert (row.fixed, row.charge, context.stats().fixed) == (4096, 2 * MIB + 4096, 4096)
        with pytest.raises(UsageError, match="size -1 is not between"):
            context.set_fixed(-1)


def test_limits(ledger: Ledger, context: Context) -> None:
    context.reserve(8 * MIB).ensure(0, 2 * MIB)
    assert ledger.get_limit("one").revision == 0
    assert ledger.get_limit(None).limit is None
    first = ledger.set_limit("one", 4 * MIB, revision=5)
    assert (first.result, first.revision, first.limit) == (LimitResult.APPLIED, 5, 4 * MIB)
    assert ledger.set_limit("one", 8 * MIB, revision=4).result is LimitResult.STALE
    assert ledger.set_limit("one", 8 * MIB, revision=5).result is LimitResult.CONFLICT
    low = ledger.set_limit("one", MIB)
    assert (low.result, low.revision) == (LimitResult.DEFERRED, 6)
    assert (low.limit, low.charge, low.overage) == (MIB, 2 * MIB, MIB)
    assert context.stats().limit == MIB
    context.set_limit(None)
    assert ledger.get_limit("one").limit is None
    assert ledger.set_limit(None, MIB).result is LimitResult.DEFERRED
    assert context.stats().card_limit == MIB
    with pytest.raises(CallError, match=r"set the limit of group 'nobody'.*KVCACHED_E_SLOT"):
        ledger.set_limit("nobody", MIB)


CHILD = """
import sys
import threading
from pathlib import Path
from kvpatch.runtime import Context, Kind, Library, Options
library, ledger = map(Path, sys.argv[1:])
with Context(Options(ledger=ledger, name="child", group="child"), library=Library(library)) as context:
    region = context.reserve(1 << 30)
    region.write(0, b"kept" * 4096)
    region.ensure(1 << 20, 8192)
    region.release(1 << 20, 8192)
    for line in iter(sys.stdin.readline, ""):
        if line == "enter\\n":
            context.enter()
        elif line == "leave\\n":
            context.leave()
        content = region.read(0, 4).decode() if line == "read\\n" else ""
        print(context.stats().asleep, content, flush=True)
"""


def test_commands_to_another_process(lib: Library, ledger: Ledger, path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(lib.path), str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def ask(line: str) -> list[str]:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(line + "\n")
        child.stdin.flush()
        return child.stdout.readline().split()

    with child:
        assert ask("ready") == ["0"]
        (slot,) = ledger.slots()
        assert (slot.pid, slot.idle) == (child.pid, 8192)
        assert ledger.command(slot.slot, Command.TRIM) == 8192
        assert ledger.command(slot.slot, Command.SLEEP) == 16384
        (slot,) = ledger.slots()
        assert (slot.claim, slot.asleep) == (0, 16384)
        assert slot.host_bytes >= 16384
        assert ledger.command(slot.slot, Command.WAKE) == 0
        assert ledger.slots()[0].claim == 16384
        ask("enter")
        with pytest.raises(CallError) as caught:
            ledger.command(slot.slot, Command.SLEEP)
        assert caught.value.name == "KVCACHED_E_BUSY"
        ask("leave")
        assert ledger.command(slot.slot, Command.SLEEP) == 16384
        assert ask("stats") == ["16384"]
        assert ask("read") == ["0", "kept"]
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=20) == 0
    with pytest.raises(CallError) as caught:
        ledger.command(slot.slot, Command.TRIM)
    assert caught.value.name == "KVCACHED_E_SLOT"


def test_the_bell(ledger: Ledger, context: Context) -> None:
    region = context.reserve(MIB)
    region.ensure(0, MIB)
    seen = ledger.wait()
    assert seen > 0
    assert ledger.wait(seen, timeout_ms=1) == seen
    region.release(0, MIB)
    assert ledger.wait(seen, timeout_ms=1) == seen  # idle, and nobody wants it
    assert context.trim() == MIB
    assert ledger.wait(seen, timeout_ms=60_000) > seen
    with pytest.raises(UsageError, match="timeout_ms -1"):
        ledger.wait(seen, timeout_ms=-1)


def test_calls_wait_for_their_lessor(lib: Library, ledger: Ledger, path: Path) -> None:
    slots = [ledger.lease("one", name, 0, limit=4 * MIB) for name in ("a", "b")]
    options = [Options(ledger=path, slot=slot, limit=4 * MIB, group_wait_ms=60_000) for slot in slots]
    with Context(options[0], library=lib) as idle, Context(options[1], library=lib) as busy:
        idle.reserve(3 * MIB).ensure(0, 3 * MIB)
        region = busy.reserve(8 * MIB)
        seen = ledger.wait()
        failures: list[str] = []

        def grow() -> None:
            try:
                region.ensure(0, 3 * MIB)
            except CallError as error:
                failures.append(error.name)

        def parked() -> Slot:
            nonlocal seen
            while True:
                seen = ledger.wait(seen, timeout_ms=60_000)
                for slot in ledger.slots():
                    if slot.parked:
                        return slot

        for command in (Command.REFUSE, Command.SLEEP):
            thread = threading.Thread(target=grow)
            thread.start()
            slot = parked()
            assert (slot.slot, slot.wants, slot.parked) == (slots[1], 3 * MIB, 1)
            assert busy.stats().wants == 3 * MIB
            ledger.command(slots[command is Command.REFUSE], command, wait_ms=60_000)
            thread.join()
        assert failures == ["KVCACHED_E_LIMIT"]
        assert busy.stats().parks == 2
        asleep, awake = ledger.slots()
        assert (asleep.kind_asleep, asleep.kind_reserved) == ((3 * MIB, 0, 0), (3 * MIB, 0, 0))
        assert (awake.kind_bytes, awake.kind_reserved) == ((3 * MIB, 0, 0), (8 * MIB, 0, 0))
        assert (awake.wants, awake.wants_since_ns, awake.parked) == (0, 0, 0)
