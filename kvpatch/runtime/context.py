"""A context: memory of one device, in regions that are reserved in full and occupied where they are in use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from ctypes import byref
from dataclasses import dataclass
from typing import Any

from kvpatch.errors import UsageError
from kvpatch.runtime.binding import (
    INT_MAX,
    UINT32_MAX,
    CallError,
    Closing,
    Library,
    frozen,
    limit_number,
    limit_or_none,
    load,
    member,
    number,
    text,
)
from kvpatch.runtime.structures import (
    EVENT_FUNCTION,
    LOG_FUNCTION,
    NO_CONTROL,
    RELOAD_FUNCTION,
    UINT64_MAX,
    Backend,
    Event,
    Kind,
    LogLevel,
    Lookahead,
    OptionsStruct,
    RangeStruct,
    StatsStruct,
)

ALL_KINDS = tuple(Kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a context is opened; None leaves the library's default. Sizes and limits are bytes.

    `ledger` is a path, None or True the device's own, False none at all. `slot` -1 takes a free one. `backend` and
    `lookahead` may be given by name. What is wrong raises UsageError when the context is opened. `control` False:
    commands to its slot are not answered. `log` is called with the context locked, and from the library's threads: it
    must not use the context. `event` hears of sleep, waking and trims, with the figures of that moment; it is called as
    `log` is, and must not use the library nor raise.
    """

    backend: Backend | int | str = Backend.HOST
    page_size: int | None = None
    large_page: int | None = None
    limit: int | None = None
    name: str | None = None
    group: str | None = None
    ledger: str | os.PathLike[str] | bool | None = None
    slot: int | None = None
    fixed: int | None = None
    device: int | None = None
    pci_bus_id: str | None = None
    pool_limit: int | None = None
    lookahead: Lookahead | int | str | None = None
    host_limit: int | None = None
    headroom: int | None = None
    room_wait_ms: int | None = None
    idle_trim_ms: int | None = None
    control: bool = True
    log: Callable[[LogLevel, str], None] | None = None
    event: Callable[[Event, Stats], None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Figures of a context or a region, as kvcached_stats_t: bytes, counts, nanoseconds. Limits: None is no limit."""

    reserved: int
    mapped: int
    idle: int
    page_size: int
    limit: int | None
    group_charge: int
    ensures: int
    releases: int
    trims: int
    limit_failures: int
    kind_mapped: tuple[int, int, int]
    ready: int
    pooled: int
    asleep: int
    host_bytes: int
    host_pinned: int
    host_limit: int | None
    card_limit: int | None
    card_charge: int
    sleeps: int
    wakes: int
    last_sleep_ns: int
    last_wake_ns: int
    device_calls: int
    last_inside_ns: int
    kind_asleep: tuple[int, int, int]


class Context(Closing):
    """An open context; every failing method raises CallError. Not to be used by one thread while another closes it."""

    def __init__(self, options: Options | None = None, *, library: Library | None = None) -> None:
        """Open a context and take its slot in the ledger. Raises CallError, UsageError for an option."""
        options = options or Options()
        self.library = library or load()
        struct = OptionsStruct()
        self.library.raw("options_init", byref(struct))
        _fill(struct, options)
        handle = ctypes.c_void_p()
        self.library.call("open a context", "open", byref(struct), byref(handle))
        assert handle.value is not None
        self._handle: int | None = handle.value
        self._reload_error: BaseException | None = None
        # What the library may call must outlive its handle.
        self._callbacks: dict[int, Any] = {}
        self._finalizer = weakref.finalize(
            self, _shutdown, self.library, handle.value, struct, self._callbacks
        )

    def close(self) -> None:
        """Free all regions and allocations, give the slot back and end the context."""
        self._handle = None
        self._finalizer()

    @property
    def page_size(self) -> int:
        """Bytes of a KV page."""
        size: int = self.library.raw("page_size", self._open())
        return size

    def reserve(self, size: int, kind: Kind = Kind.KV) -> Region:
        """Reserve `size` bytes of addresses, rounded up to whole pages; nothing is mapped."""
        handle = ctypes.c_void_p()
        what, length = member("kind", Kind, kind), number("size", size)
        self._call(f"reserve {length} bytes", "reserve", self._open(), int(what), length, byref(handle))
        assert handle.value is not None
        return Region(self, handle.value, what)

    def alloc(self, size: int) -> int:
        """The address of `size` bytes, mapped and zero, whose content survives sleep."""
        address: int | None = self.library.raw("alloc", self._open(), number("size", size))
        if address is None:
            raise self.library.failure(f"allocate {size} bytes", None)
        return address

    def free(self, address: int) -> None:
        """Free what `alloc` returned; any other address is refused with a log line."""
        self.library.raw("free", self._open(), number("address", address))

    def available(self) -> int:
        """Bytes that could be had now without asking other processes; 0 on failure."""
        size: int = self.library.raw("available", self._open())
        return size

    def set_limit(self, limit: int | None) -> None:
        """Set the limit of the context's group (None removes it); its own idle memory above it is given back."""
        self.library.raw("set_limit", self._open(), limit_number("limit", limit))

    def enter(self) -> None:
        """Enter the gate, waking what sleeps: nothing goes to sleep until this thread has left it."""
        self._call("enter the gate", "enter", self._open())

    def leave(self) -> None:
        """Leave the gate, on the thread that entered."""
        self._call("leave the gate", "leave", self._open())

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """The gate around a block; it may be nested."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def set_queued(self, requests: int) -> None:
        """Say how many requests wait: while there are any, nobody else's want of memory puts this context to sleep."""
        self._call(
            "say how many requests wait",
            "set_queued",
            self._open(),
            number("requests", requests, UINT32_MAX),
        )

    def prepare_sleep(self, kinds: Iterable[Kind] = ALL_KINDS) -> None:
        """Ask for the host memory and copies that a later sleep needs, in the background."""
        self._call("prepare sleep", "prepare_sleep", self._open(), _bits(kinds))

    def sleep(self, kinds: Iterable[Kind] = ALL_KINDS, *, wait_ms: int = 1000) -> int:
        """Put the regions of these kinds to sleep once the gate is empty; returns the bytes given back."""
        freed = ctypes.c_size_t()
        wait = number("wait_ms", wait_ms, UINT32_MAX)
        self._call("sleep", "sleep", self._open(), _bits(kinds), wait, byref(freed))
        return freed.value

    def wake(self, kinds: Iterable[Kind] = ALL_KINDS) -> None:
        """Wake the regions of these kinds."""
        self._call("wake", "wake", self._open(), _bits(kinds))

    def trim(self, keep: int = 0) -> int:
        """Give pooled, ready and idle memory back until at most `keep` bytes of it remain; returns the bytes."""
        freed = ctypes.c_size_t()
        self._call("trim", "trim", self._open(), number("keep", keep), byref(freed))
        return freed.value

    def trim_host(self, *, weights: bool = False) -> int:
        """Give host memory back that holds nothing needed any more, with `weights` also the copies of weights that are
        awake; returns the bytes."""
        freed = ctypes.c_size_t()
        self._call("trim host memory", "trim_host", self._open(), int(weights), byref(freed))
        return freed.value

    def stats(self) -> Stats:
        """Totals of the context."""
        return self._stats("stats", self._open())

    def device_memory(self) -> tuple[int, int]:
        """Free and total bytes of the device, for all processes."""
        free, total = ctypes.c_uint64(), ctypes.c_uint64()
        self._call("ask for the device's memory", "device_memory", self._open(), byref(free), byref(total))
        return free.value, total.value

    def _stats(self, function: str, handle: int) -> Stats:
        out = StatsStruct(struct_size=ctypes.sizeof(StatsStruct))
        self._call("read the figures", function, handle, byref(out))
        return _figures(out)

    def _call(self, action: str, function: str, *arguments: Any) -> None:
        try:
            self.library.call(action, function, *arguments)
        except CallError as error:
            if error.name == "KVCACHED_E_RELOAD":
                raise error from self._reload_error
            raise

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError("the context is closed")
        return self._handle


class Region(Closing):
    """Addresses reserved from a context. Offsets and lengths are bytes; every failing method raises CallError.

    It lasts until it is closed or its context is: dropping the object alone gives nothing back.
    """

    def __init__(self, context: Context, handle: int, kind: Kind) -> None:
        """Made by Context.reserve alone."""
        raw = context.library.raw
        self._context = context
        self._handle: int | None = handle
        self.kind = kind
        self.base: int = raw("region_base", handle)
        self.size: int = raw("region_size", handle)
        self.page_size: int = raw("region_page_size", handle)

    def close(self) -> None:
        """Give back pages, host copy and addresses. Safe to repeat, and after the context was closed."""
        handle, self._handle = self._handle, None
        if handle is not None and self._context._handle is not None:
            self._context.library.raw("unreserve", handle)
            self._context._callbacks.pop(handle, None)

    def ensure(self, offset: int, length: int) -> None:
        """Make every page touching the range usable, or none."""
        self._range("ensure", offset, length)

    def ensure_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The same for several ranges (offset, length) as one call: all of them or none."""
        self._ranges("ensure", ranges)

    def prepare(self, offset: int, length: int) -> None:
        """Ask that unmapped pages of the range be mapped ahead of an ensure."""
        self._range("prepare", offset, length)

    def prepare_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The same for several ranges (offset, length), worked off in their order; none: forgets the last request."""
        self._ranges("prepare", ranges)

    def release(self, offset: int, length: int) -> None:
        """Drop the content of all pages wholly inside the range; their memory stays for reuse until a trim."""
        self._range("release", offset, length)

    def clear(self, offset: int, length: int) -> None:
        """Zero the range's ensured pages in it."""
        self._range("clear", offset, length)

    def mapped_run(self, offset: int, length: int) -> tuple[int, bool]:
        """The longest prefix of the range that is ensured throughout or nowhere: its length, and which."""
        run, ensured = ctypes.c_size_t(), ctypes.c_int()
        self._range("mapped_run", offset, length, byref(run), byref(ensured))
        return run.value, bool(ensured.value)

    def read(self, offset: int, length: int) -> bytes:
        """Copy the range out, waking a sleeping region; pages that are not ensured read as zero."""
        # Checked first: a buffer for a length out of range must not be made.
        length = number("length", length, self.size)
        buffer = ctypes.create_string_buffer(length)
        start = number("offset", offset)
        self._context._call(f"read {length} bytes at {offset}", "read", self._open(), start, buffer, length)
        return buffer.raw

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` in, ensuring the pages it touches."""
        raw = bytes(data)
        start = number("offset", offset)
        self._context._call(
            f"write {len(raw)} bytes at {offset}", "write", self._open(), start, raw, len(raw)
        )

    def set_reload(self, reload: Callable[[Region], None] | None) -> None:
        """Have `reload` restore the content of a WEIGHTS region on waking where the host budget has no room for a copy;
        an exception it raises becomes the cause of the CallError. It may use `write` of this region alone."""
        function = RELOAD_FUNCTION(0) if reload is None else RELOAD_FUNCTION(self._reloader(reload))
        handle = self._open()
        self._context._call("set the reload function", "set_reload", handle, function, None)
        self._context._callbacks[handle] = function

    def stats(self) -> Stats:
        """Figures of the region."""
        return self._context._stats("region_stats", self._open())

    def _reloader(self, reload: Callable[[Region], None]) -> Callable[[Any, Any], int]:
        region = weakref.proxy(self)
        context = weakref.proxy(self._context)

        def call(_region: Any, _user: Any) -> int:
            try:
                reload(region)
            except (
                BaseException
            ) as error:  # C has no exceptions: it goes on from the call that woke the region
                context._reload_error = error
                return -1
            return 0

        return call

    def _range(self, function: str, offset: int, length: int, *out: Any) -> None:
        where = f"{function.replace('_', ' ')} {length} bytes at {offset}"
        start, size = number("offset", offset), number("length", length)
        self._context._call(where, function, self._open(), start, size, *out)

    def _ranges(self, what: str, ranges: Iterable[tuple[int, int]]) -> None:
        pairs = [RangeStruct(number("offset", off), number("length", length)) for off, length in ranges]
        array = (RangeStruct * len(pairs))(*pairs)
        where = f"{what} {len(pairs)} ranges"
        self._context._call(where, f"{what}_ranges", self._open(), array, len(pairs))

    def _open(self) -> int:
        self._context._open()
        if self._handle is None:
            raise ValueError("the region is closed")
        return self._handle


def _fill(struct: OptionsStruct, options: Options) -> None:
    """Put what `options` says over the library's defaults."""
    struct.backend = int(member("backend", Backend, options.backend))
    for name in ("page_size", "large_page", "limit", "fixed", "pool_limit", "host_limit", "headroom"):
        value = getattr(options, name)
        if value is not None:
            setattr(struct, name, number(name, value, UINT64_MAX))
    for name in ("room_wait_ms", "idle_trim_ms"):
        value = getattr(options, name)
        if value is not None:
            setattr(struct, name, number(name, value, UINT32_MAX))
    if options.slot is not None:
        struct.slot = number("slot", options.slot, INT_MAX, least=-1)
    if options.device is not None:
        struct.device = number("device", options.device, INT_MAX)
    if options.lookahead is not None:
        struct.lookahead = int(member("lookahead", Lookahead, options.lookahead))
    for name in ("name", "group", "pci_bus_id"):
        setattr(struct, name, text(name, getattr(options, name)))
    struct.ledger_path = _ledger_path(options.ledger)
    if not options.control:
        struct.flags = NO_CONTROL
    if options.log is not None:
        log = options.log

        def call(level: int, message: bytes, _user: Any) -> None:
            log(LogLevel(level), message.decode("utf-8", "replace"))

        struct.log = LOG_FUNCTION(call)
    if options.event is not None:
        event = options.event

        def tell(what: int, now: Any, _user: Any) -> None:
            event(Event(what), _figures(now.contents))

        struct.event = EVENT_FUNCTION(tell)


def _figures(struct: StatsStruct) -> Stats:
    limits = dict.fromkeys(("limit", "host_limit", "card_limit"), limit_or_none)
    return frozen(Stats, struct, **limits)


def _ledger_path(ledger: str | os.PathLike[str] | bool | None) -> bytes | None:
    """The path as the library takes it: NULL is the device's own ledger, "" is none."""
    if ledger is None or ledger is True:
        return None
    if ledger is False:
        return b""
    # What C would take for "none" must not come of a path that was left empty.
    if not isinstance(ledger, (str, os.PathLike)) or not os.fspath(ledger):
        raise UsageError(f"ledger {ledger!r} is not a path, and not None, True or False")
    return text("the ledger's path", ledger)


def _shutdown(library: Library, handle: int, struct: OptionsStruct, callbacks: dict[int, Any]) -> None:
    # `struct` and `callbacks` are here to live until the context does not call them any more.
    library.raw("shutdown", handle)
    callbacks.clear()


def _bits(kinds: Iterable[Kind]) -> int:
    bits = 0
    for kind in kinds:
        bits |= 1 << member("kind", Kind, kind)
    return bits
