"""The binding over the real library on the host backend, and where that library comes from."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from kvpatch import library, manifest, paths, process
from kvpatch.errors import CompileError, LibraryError, ToolchainError, UsageError, VerifyError
from kvpatch.runtime import (
    Backend,
    CallError,
    Command,
    Context,
    Event,
    Kind,
    Ledger,
    Library,
    LimitResult,
    LogLevel,
    Lookahead,
    Options,
    Stats,
    load,
    structures,
)
from kvpatch.runtime import context as opening

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "vmm" / "include" / "kvcached.h"
MIB = 1 << 20


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the library compiled."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on PATH")
    root = tmp_path_factory.mktemp("cache")
    library.of_cache(root)
    return root


@pytest.fixture(scope="session")
def lib(shared_cache: Path) -> Library:
    return load(cache=shared_cache)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of the test's own."""
    return tmp_path / "ledger"


@pytest.fixture
def ledger(lib: Library, path: Path) -> Iterator[Ledger]:
    with Ledger(path, library=lib) as opened:
        yield opened


@pytest.fixture
def context(lib: Library, path: Path) -> Iterator[Context]:
    options = Options(ledger=path, name="model.gguf", group="one", limit=64 * MIB)
    with Context(options, library=lib) as opened:
        yield opened


# ---- the header ----


def c_program(folder: Path, body: str) -> str:
    """What a C program with this body prints."""
    source = folder / "facts.c"
    source.write_text(
        f'#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n{body}  return 0;\n}}\n',
        encoding="utf-8",
    )
    subprocess.run(["cc", "-std=c11", "-o", folder / "facts", source], check=True)
    return subprocess.run([folder / "facts"], check=True, capture_output=True, text=True).stdout


def code_of_header() -> str:
    """The header without comments and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", " ", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL))


STRUCTS: dict[str, Any] = {
    "kvcached_options_t": structures.OptionsStruct,
    "kvcached_stats_t": structures.StatsStruct,
    "kvcached_limit_t": structures.LimitStruct,
    "kvcached_slot_t": structures.SlotStruct,
    "kvcached_range_t": structures.RangeStruct,
}
ENUMS: dict[str, type[IntEnum]] = {
    "BACKEND_": Backend,
    "LOG_": LogLevel,
    "LOOKAHEAD_": Lookahead,
    "": Kind,
    "LIMIT_": LimitResult,
    "CMD_": Command,
    "EVENT_": Event,
}


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    body, expected = "", []
    for name, cls in STRUCTS.items():
        body += f'  printf("{name} %zu\\n", sizeof({name}));\n'
        expected.append(f"{name} {ctypes.sizeof(cls)}")
        for field, kind in cls._fields_:
            where = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            body += f'  printf("{name}.{field} %zu %zu\\n", {where});\n'
            expected.append(f"{name}.{field} {getattr(cls, field).offset} {ctypes.sizeof(kind)}")
    assert c_program(tmp_path, body).splitlines() == expected
    # A field in what is padding now would change no size.
    text = code_of_header()
    found = dict(re.findall(r"typedef struct \w+ \{([^}]*)\} (kvcached_\w+_t);", text))
    declared = {name: fields for fields, name in found.items()}
    assert declared.keys() == STRUCTS.keys()
    for name, fields in declared.items():
        members = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", fields)
        names = re.findall(r"(\w+)(?:\[[^]]*\])? ?[,;]", members)
        assert names == [field for field, _ in STRUCTS[name]._fields_]


def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    values: dict[str, int] = {
        "ABI_VERSION": structures.ABI,
        "NAME_MAX": structures.NAME_MAX,
        "GROUP_MAX": structures.GROUP_MAX,
        "PATH_MAX": structures.PATH_MAX,
        "DEVICE_HOST": structures.DEVICE_HOST,
        "NO_CONTROL": structures.NO_CONTROL,
    }
    for prefix, enum in ENUMS.items():
        values |= {f"{prefix}{member.name}": int(member) for member in enum}
    body = "".join(f'  printf("{name} %d\\n", (int)KVCACHED_{name});\n' for name in values)
    assert c_program(tmp_path, body).splitlines() == [f"{name} {value}" for name, value in values.items()]
    named = re.findall(r"KVCACHED_(\w+) = ", code_of_header())
    assert sorted(named) == sorted(values.keys() - set(list(values)[:5]))


def test_prototypes_are_those_of_the_header() -> None:
    words: dict[str, Any] = {
        "void": None,
        "int": ctypes.c_int,
        "unsigned": ctypes.c_uint32,
        "uint32_t": ctypes.c_uint32,
        "uint64_t": ctypes.c_uint64,
        "size_t": ctypes.c_size_t,
        "const char *": ctypes.c_char_p,
        "char *": ctypes.c_char_p,
        "void *": ctypes.c_void_p,
        "const void *": ctypes.c_void_p,
        "kvcached_ctx_t": ctypes.c_void_p,
        "kvcached_region_t": ctypes.c_void_p,
        "kvcached_ledger_t": ctypes.c_void_p,
        "kvcached_reload_fn": structures.RELOAD_FUNCTION,
        **STRUCTS,
    }

    def kind(text: str) -> Any:
        text = text.strip()
        if text in words:
            return words[text]
        assert text.endswith("*"), text
        return ctypes.POINTER(words[text.removesuffix("*").removeprefix("const ").strip()])

    declared = {}
    pattern = r"KVCACHED_API ((?:const )?\w+(?: ?\*)?) ?kvcached_(\w+)\(([^)]*)\)"
    for result, name, arguments in re.findall(pattern, code_of_header()):
        types = [re.sub(r"\w+$", "", a.strip()) for a in arguments.split(",") if a.strip() != "void"]
        declared[name] = (kind(result), [kind(text) for text in types])
    assert declared == structures.PROTOTYPES


# ---- regions ----


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
        opening._fill(struct, Options(ledger=named))
        assert struct.ledger_path == taken


def test_an_empty_path_is_not_the_default(lib: Library) -> None:
    with pytest.raises(CallError) as caught:
        Ledger("", library=lib)
    assert "/dev/shm/kvcached" not in caught.value.message


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


# ---- the ledger ----


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


# ---- where the library comes from ----


def shared_object(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    code = path.with_suffix(".c")
    code.write_text(source, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, code], check=True)
    code.unlink()
    return path


def build_of(folder: Path, name: str, content: bytes) -> None:
    """A folder with a manifest that lists one file."""
    target = folder / name
    target.parent.mkdir(parents=True)
    target.write_bytes(content)
    row = {"path": name, "sha256": library.hashing.of_file(target)}
    manifest.write({"schema": manifest.SCHEMA, "artifacts": [row]}, folder)


def test_the_library_of_a_build(tmp_path: Path) -> None:
    build_of(tmp_path / "out", "lib/ollama/libkvcached.so", b"library")
    there = tmp_path / "out" / "lib" / "ollama" / "libkvcached.so"
    assert library.find(tmp_path / "out") == there
    assert library.find(tmp_path / "out" / "kvpatch.json") == there
    assert library.find(there) == there
    there.write_bytes(b"another")
    with pytest.raises(VerifyError, match="is not the library"):
        library.find(tmp_path / "out")


def test_a_build_without_the_library(tmp_path: Path) -> None:
    build_of(tmp_path / "stock", "bin/llama-server", b"server")
    with pytest.raises(UsageError, match="stock build"):
        library.find(tmp_path / "stock")
    with pytest.raises(UsageError, match="stock build"):
        load(str(tmp_path / "stock"))
    (tmp_path / "made").mkdir()
    with pytest.raises(UsageError, match=r"has no libkvcached\.so"):
        library.find(tmp_path / "made")
    (tmp_path / "made" / "libkvcached.so").write_bytes(b"")
    assert library.find(tmp_path / "made").name == "libkvcached.so"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of another library, small, in place of ours."""
    root = tmp_path / "data"
    (root / "vmm" / "src").mkdir(parents=True)
    (root / "vmm" / "include").mkdir()
    shutil.copy(HEADER, root / "vmm" / "include")
    (root / "vmm" / "src" / "one.c").write_text("int one(void) { return 1; }\n", encoding="utf-8")
    monkeypatch.setattr(paths, "data_dir", lambda: root)
    return root


def test_it_is_compiled_once_and_again_when_its_sources_change(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(library.of_cache(tmp_path / "c", progress=said.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(said) == 1
    assert library.of_cache(tmp_path / "c", progress=said.append) == found[0]
    assert sorted(p.name for p in found[0].parent.iterdir() if p.name != "lock") == [
        "compile.log",
        "libkvcached.so",
    ]
    (data / "vmm" / "src" / "two.c").write_text(
        '__attribute__((visibility("default"))) int two(void) { return 2; }\n', encoding="utf-8"
    )
    second = library.of_cache(tmp_path / "c", progress=said.append)
    assert second != found[0]
    assert ctypes.CDLL(str(second)).two() == 2
    assert len(said) == 2


def test_without_a_compiler(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = library.of_cache(tmp_path / "full")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert library.of_cache(tmp_path / "full") == made
    with pytest.raises(ToolchainError, match="none of cc, gcc, clang is on PATH") as caught:
        library.of_cache(tmp_path / "empty")
    assert (caught.value.exit_code, caught.value.hint) == (3, "apt-get install gcc")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
def test_a_traceback_shows_the_hint(
    data: Path, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CallError) as limit:
        ledger.lease("one", "", 2, limit=1)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ToolchainError) as missing:
        load(cache=tmp_path / "empty")
    for error, hint in ((limit.value, "raise the limit"), (missing.value, "apt-get install gcc")):
        assert f"hint: {hint}" in "".join(traceback.format_exception(error))


def test_a_compiler_that_fails(data: Path, tmp_path: Path) -> None:
    (data / "vmm" / "src" / "one.c").write_text("int one(void) { return nonsense; }\n", encoding="utf-8")
    with pytest.raises(CompileError, match="nonsense") as caught:
        library.of_cache(tmp_path / "c")
    assert "compile.log" in (caught.value.hint or "")
    assert not list((tmp_path / "c").rglob("*.so*"))


def test_an_interrupted_compilation_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = process.run

    def interrupted(argv: Any, **kwargs: Any) -> process.Completed:
        if "-o" not in argv:
            return real(argv, **kwargs)
        Path(argv[argv.index("-o") + 1]).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            library.of_cache(tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.so*"))
    assert library.of_cache(tmp_path / "c").is_file()


def test_a_library_of_another_abi(tmp_path: Path) -> None:
    other = shared_object(tmp_path / "libkvcached.so", "unsigned kvcached_abi_version(void) { return 99; }\n")
    with pytest.raises(
        LibraryError, match=r"libkvcached\.so cannot be used: its ABI is 99, this kvpatch needs 3"
    ):
        load(other)


def test_what_is_no_libkvcached(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library", encoding="utf-8")
    with pytest.raises(LibraryError, match=r"text\.so cannot be used"):
        load(text)
    other = shared_object(tmp_path / "other.so", "int nothing;\n")
    with pytest.raises(LibraryError, match="kvcached_abi_version"):
        load(other)
    part = shared_object(
        tmp_path / "part.so", f"unsigned kvcached_abi_version(void) {{ return {structures.ABI}; }}\n"
    )
    with pytest.raises(LibraryError, match="kvcached_version"):
        load(part)


# ---- the example ----


def test_the_example_runs(lib: Library, path: Path, tmp_path: Path) -> None:
    program = tmp_path / "tour"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    where = lib.path.parent
    subprocess.run(
        ["cc", "-std=c11", *warnings, f"-I{HEADER.parent}", "-o", program, ROOT / "vmm" / "examples" / "tour.c",
         f"-L{where}", "-lkvcached", f"-Wl,-rpath,{where}"],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program, "host", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {
        line[:22].strip(): line[22:].split(",") for line in done.stdout.splitlines() if "reserved " in line
    }
    figures = {when: [int(re.sub(r"\D", "", part)) for part in row] for when, row in rows.items()}
    assert figures["reserved"] == [1088, 0, 0, 0, 0]
    assert figures["in use"] == [1088, 80, 0, 0, 0]
    assert figures["asleep"][:4] == [1088, 0, 0, 80]
    assert figures["asleep"][4] >= 80
    assert figures["awake, as before"][:4] == [1088, 80, 0, 0]
    assert figures["released"][:4] == [1088, 80, 16, 0]
    assert figures["trimmed"][:4] == [1088, 64, 0, 0]
    assert "sleep gave back 80 MiB" in done.stdout
    usage = subprocess.run([program, "hip"], capture_output=True, text=True, check=False)
    assert (usage.returncode, "usage" in usage.stderr) == (2, True)
