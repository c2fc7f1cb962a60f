"""A context: memory of one device, in regions that are reserved in full and occupied where they are in use."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterable, Iterator
from ctypes import byref
from typing import Any

from kvpatch.runtime.binding import (
    UINT32_MAX,
    CallError,
    Closing,
    Library,
    limit_number,
    load,
    member,
    number,
)
from kvpatch.runtime.options import Options, Stats, figures, fill
from kvpatch.runtime.structures import RELOAD_FUNCTION, Kind, OptionsStruct, RangeStruct, StatsStruct

ALL_KINDS = tuple(Kind)


class Context(Closing):
    """An open context; every failing method raises CallError. Not to be used by one thread while another closes it."""

    def __init__(self, options: Options | None = None, *, library: Library | None = None) -> None:
        """Open a context and take its slot in the ledger. Raises CallError, UsageError for an option."""
        options = options or Options()
        self.library = library or load()
        struct = OptionsStruct()
        self.library.raw("options_init", byref(struct))
        fill(struct, options)
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

    def set_fixed(self, size: int) -> None:
        """Say what this process holds on the device outside the library, in all; it is charged beside the pages."""
        self._call(f"be charged {size} bytes held elsewhere", "set_fixed", self._open(), number("size", size))

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
        return figures(out)

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


def _shutdown(library: Library, handle: int, struct: OptionsStruct, callbacks: dict[int, Any]) -> None:
    # `struct` and `callbacks` are here to live until the context does not call them any more.
    library.raw("shutdown", handle)
    callbacks.clear()


def _bits(kinds: Iterable[Kind]) -> int:
    bits = 0
    for kind in kinds:
        bits |= 1 << member("kind", Kind, kind)
    return bits
