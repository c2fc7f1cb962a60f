"""libkvcached from Python: the ledger as everybody sees it, and contexts of one's own.

    with Ledger() as ledger:
        for slot in ledger.slots():
            ...
        ledger.command(slot.slot, Command.SLEEP)

A thin layer over the C library's public header (vmm/include/kvcached.h), which says what each call promises. The
library is loaded on first use; `load` says where from.
"""

from __future__ import annotations

from kvpatch.runtime.binding import CallError, Library, load
from kvpatch.runtime.context import ALL_KINDS, Context, Region
from kvpatch.runtime.ledger import Ledger, Limit, Slot
from kvpatch.runtime.options import Options, Stats
from kvpatch.runtime.structures import Backend, Command, Event, Kind, LimitResult, LogLevel, Lookahead

__all__ = [
    "ALL_KINDS",
    "Backend",
    "CallError",
    "Command",
    "Context",
    "Event",
    "Kind",
    "Ledger",
    "Library",
    "Limit",
    "LimitResult",
    "LogLevel",
    "Lookahead",
    "Options",
    "Region",
    "Slot",
    "Stats",
    "load",
]
