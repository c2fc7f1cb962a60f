"""What the binding takes for numbers, enums, strings and paths, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpatch.errors import UsageError
from kvpatch.runtime import (
    Backend,
    CallError,
    Command,
    Context,
    Ledger,
    Library,
    Options,
    structures,
)
from kvpatch.runtime.options import fill

MIB = 1 << 20


def test_numbers_and_strings_that_c_would_cut_are_refused(context: Context, ledger: Ledger) -> None:
    region = context.reserve(MIB)
    for call in (
        lambda: region.ensure(-1, 4096),
        lambda: region.read(0, -1),
        lambda: region.read(0, MIB + 1),
        lambda: context.reserve(-4096),
        lambda: ledger.lease("a\0b", "", 1),
        lambda: ledger.set_limit("one", 1, revision=1 << 32),
        lambda: ledger.set_limit("one", 1 << 64),
        lambda: context.free(1 << 64),
        lambda: context.free(-1),
    ):
        with pytest.raises(UsageError):
            call()
    slot = ledger.lease("one", "", 4096)
    for wrong in (slot + 2**32, slot - 2**32, 2**31, -1):
        with pytest.raises(UsageError, match=f"slot {wrong} is not between 0 and 2147483647"):
            ledger.unlease(wrong)
        with pytest.raises(UsageError, match=f"slot {wrong} is not between"):
            ledger.command(wrong, Command.TRIM)
    ledger.unlease(slot)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(slot=2**32 - 1), "slot 4294967295 is not between -1 and 2147483647"),
        (Options(slot=-2), "slot -2 is not between -1"),
        (Options(device=2**32), "device 4294967296 is not between 0 and"),
        (Options(device=-1), "device -1 is not"),
        (Options(limit=60e9), "limit 60000000000.0 is not an integer"),  # type: ignore[arg-type]
        (Options(name=5), "name 5 is not a string"),  # type: ignore[arg-type]
        (Options(backend="metal"), r"backend 'metal' is none of host \(0\), cuda \(1\)"),
        (Options(backend=7), "backend 7 is none of host"),
        (Options(lookahead="never"), r"lookahead 'never' is none of auto \(0\), thread"),
        (Options(ledger=""), "ledger '' is not a path"),
        (Options(ledger=0), "ledger 0 is not a path"),
        (Options(ledger=b"/l"), "ledger b'/l' is not a path"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options_are_refused(lib: Library, options: Options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Context(options, library=lib)


def test_only_integers_are_numbers(ledger: Ledger, context: Context) -> None:
    nothing: Any = None
    region = context.reserve(MIB)
    for call, message in (
        (lambda: ledger.set_limit(None, 60e9), "limit 60000000000.0 is not an integer"),  # type: ignore[arg-type]
        (lambda: ledger.unlease(nothing), "slot None is not an integer"),
        (lambda: context.reserve(nothing), "size None is not an integer"),
        (lambda: region.read(0, nothing), "length None is not an integer"),
        (lambda: context.trim("all"), "keep 'all' is not an integer"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_enums_by_number_and_by_name(lib: Library, path: Path, ledger: Ledger) -> None:
    for backend in (Backend.HOST, 0, "host", "HOST"):
        options = Options(ledger=path, backend=backend, lookahead="off", slot=-1)
        with Context(options, library=lib) as context:
            assert context.page_size == 4096
            (slot,) = ledger.slots()
    for command in (Command.TRIM, 1, "trim"):
        with pytest.raises(CallError, match=f"have slot {slot.slot} trim: KVCACHED_E_SLOT"):
            ledger.command(slot.slot, command)
    for wrong in (0, 2**32 + 1, "stop"):
        with pytest.raises(UsageError, match=f"command {wrong!r} is none of trim") as caught:
            ledger.command(slot.slot, wrong)
        assert "sleep (2), wake (3)" in caught.value.message


def test_a_ledger_is_named_by_any_path(lib: Library, path: Path, ledger: Ledger) -> None:
    for named in (path, str(path)):
        with Context(Options(ledger=named, name="here"), library=lib), Ledger(named, library=lib) as other:
            assert other.path == path
            assert [slot.name for slot in ledger.slots()] == ["here"]
    with Context(Options(ledger=False), library=lib):
        assert ledger.slots() == ()
    # The default ledger is others' too: no context is opened in it here.
    for named, taken in ((None, None), (True, None), (False, b"")):
        struct = structures.OptionsStruct()
        fill(struct, Options(ledger=named))
        assert struct.ledger_path == taken


def test_an_empty_path_is_not_the_default(lib: Library) -> None:
    with pytest.raises(CallError) as caught:
        Ledger("", library=lib)
    assert "/dev/shm/kvcached" not in caught.value.message
