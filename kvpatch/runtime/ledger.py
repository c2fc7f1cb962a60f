"""The ledger: who holds memory on a device, and under which limits. Looking at it needs no driver and no thread."""

from __future__ import annotations

import ctypes
import os
import weakref
from ctypes import byref
from dataclasses import dataclass
from pathlib import Path

from kvpatch.runtime.binding import (
    INT_MAX,
    UINT32_MAX,
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
from kvpatch.runtime.structures import PATH_MAX, Command, LimitResult, LimitStruct, SlotStruct

_FIRST_CAPACITY = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A process's place in the ledger. Amounts are bytes; `limit` None is no limit.

    `charge` counts against the limits: max(lease, fixed + claim). `kind_*` are in the order of Kind. Times are
    nanoseconds of CLOCK_MONOTONIC, 0 for never. `pid` is for display: it may be of another pid namespace. `wants` is
    by how much the charge has to grow for calls of it to go on that wait for room, on `parked` threads.
    """

    slot: int
    pid: int
    name: str
    group: str
    lease: int
    fixed: int
    claim: int
    reserved: int
    charge: int
    leased: bool
    attached: bool
    kind_bytes: tuple[int, int, int]
    idle: int
    pooled: int
    asleep: int
    host_bytes: int
    limit: int | None
    last_use_ns: int
    woke_ns: int
    inside: int
    queued: int
    controlled: bool
    wants: int
    wants_since_ns: int
    context_bytes: int
    kind_reserved: tuple[int, int, int]
    kind_asleep: tuple[int, int, int]
    parked: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A limit in force. Bytes; `limit` None is no limit; `revision` 0: none was set."""

    result: LimitResult
    revision: int
    limit: int | None
    charge: int
    overage: int


class Ledger(Closing):
    """An open ledger. Not to be used by one thread while another closes it."""

    def __init__(self, path: str | os.PathLike[str] | None = None, *, library: Library | None = None) -> None:
        """Open the ledger at `path` (default: the host's), creating it when there is none. Raises CallError."""
        self.library = library or load()
        handle = ctypes.c_void_p()
        self.library.call(
            f"open the ledger {path if path is not None else self.default_path(library=self.library)!s}",
            "ledger_open",
            text("the ledger's path", path),
            byref(handle),
        )
        self._handle: int | None = handle.value
        raw: bytes = self.library.raw("ledger_path", handle)
        self.path = Path(raw.decode("utf-8", "surrogateescape"))
        # Leases end with the handle: also when it is dropped, or Python ends.
        self._finalizer = weakref.finalize(self, self.library.raw, "ledger_close", handle.value)

    @staticmethod
    def default_path(device: str | None = None, *, library: Library | None = None) -> Path:
        """Where the ledger of a device is: None is the host, else the UUID of a GPU or MIG instance as nvidia-smi
        prints it. Raises CallError for anything else."""
        lib = library or load()
        buffer = ctypes.create_string_buffer(PATH_MAX)
        lib.call(
            f"name the ledger of device {device!r}",
            "ledger_default_path",
            text("the device", device),
            buffer,
            PATH_MAX,
        )
        return Path(buffer.value.decode())

    def close(self) -> None:
        """Drop all leases taken through this handle, and the handle."""
        self._handle = None
        self._finalizer()

    def slots(self) -> tuple[Slot, ...]:
        """The live slots, by number. Raises CallError."""
        capacity = _FIRST_CAPACITY
        while True:
            rows = (SlotStruct * capacity)()
            rows[0].struct_size = ctypes.sizeof(SlotStruct)
            n = ctypes.c_size_t()
            self.library.call(
                "list the ledger's slots", "ledger_slots", self._open(), rows, capacity, byref(n)
            )
            if n.value <= capacity:
                convert = {"leased": bool, "attached": bool, "controlled": bool, "limit": limit_or_none}
                return tuple(frozen(Slot, row, **convert) for row in rows[: n.value])
            capacity = n.value

    def lease(self, group: str, name: str, size: int, *, fixed: int = 0, limit: int | None = None) -> int:
        """Set max(size, fixed) bytes aside for a child that will open a context with the slot returned.

        `limit` is what the group may be charged in all, unless its limit was set in the ledger. Raises CallError.
        """
        slot = ctypes.c_int(-1)
        self.library.call(
            f"lease {size} bytes for {name!r} in group {group!r}",
            "ledger_lease",
            self._open(),
            text("the group", group),
            text("the name", name),
            number("size", size),
            number("fixed", fixed),
            limit_number("limit", limit),
            byref(slot),
        )
        return slot.value

    def unlease(self, slot: int) -> None:
        """Drop the lease of a slot; a process that uses the slot keeps it until it ends. Raises CallError."""
        index = number("slot", slot, INT_MAX)
        self.library.call(f"drop the lease of slot {index}", "ledger_unlease", self._open(), index)

    def set_limit(self, group: str | None, limit: int | None, *, revision: int = 0) -> Limit:
        """Set the limit of a group that has a live slot, or of the card (`group` None); bytes, None removes it.

        Of two settings the one with the higher `revision` holds; 0 is one more than the one in force. What became of it
        is in the result. Raises CallError.
        """
        out = LimitStruct(struct_size=ctypes.sizeof(LimitStruct))
        self.library.call(
            f"set the limit of {_whose(group)}",
            "ledger_set_limit",
            self._open(),
            text("the group", group),
            limit_number("limit", limit),
            number("revision", revision, UINT32_MAX),
            byref(out),
        )
        return frozen(Limit, out, result=LimitResult, limit=limit_or_none)

    def get_limit(self, group: str | None) -> Limit:
        """The limit in force for a group, or for the card (`group` None). Raises CallError."""
        out = LimitStruct(struct_size=ctypes.sizeof(LimitStruct))
        self.library.call(
            f"read the limit of {_whose(group)}",
            "ledger_get_limit",
            self._open(),
            text("the group", group),
            byref(out),
        )
        return frozen(Limit, out, result=LimitResult, limit=limit_or_none)

    def wait(self, seen: int = 0, *, timeout_ms: int = 1000) -> int:
        """Wait until the ledger's bell has been rung since `seen`, or the time is up: how often it was rung by now.

        It is rung when a slot begins or ceases to want memory, when a charge falls, when a slot comes or goes. A
        process that is killed rings nothing, so look now and then. Raises CallError.
        """
        count = ctypes.c_uint32(number("seen", seen, UINT32_MAX))
        self.library.call(
            "wait for the ledger's bell",
            "ledger_wait",
            self._open(),
            byref(count),
            number("timeout_ms", timeout_ms, UINT32_MAX),
        )
        return count.value

    def command(self, slot: int, command: Command | int | str, *, wait_ms: int = 1000) -> int:
        """Have the process in a slot trim, sleep or wake, or refuse room to its calls that wait for some, and wait for
        its answer (0: only leave the command).

        Returns the bytes it gave back. Raises CallError: with the process's own error, or that it did not answer.
        """
        freed = ctypes.c_uint64()
        index, what = number("slot", slot, INT_MAX), member("command", Command, command)
        self.library.call(
            f"have slot {index} {what.name.lower()}",
            "ledger_command",
            self._open(),
            index,
            int(what),
            number("wait_ms", wait_ms, UINT32_MAX),
            byref(freed),
        )
        return freed.value

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError(f"the ledger {self.path} is closed")
        return self._handle


def _whose(group: str | None) -> str:
    return "the card" if group is None else f"group {group!r}"
