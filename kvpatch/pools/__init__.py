"""The running pools: who holds memory through libkvcached, and how to have it trimmed, slept, woken and limited.

Three ways to one picture (`View`): by the ledger files, by the socket of kvcachedd, over Ollama's /api/ps. `source`
chooses; `Ledgers` alone can command.
"""

from __future__ import annotations

from kvpatch.pools.choose import Source, Wish, source
from kvpatch.pools.driver import Drivers
from kvpatch.pools.errors import (
    DamagedError,
    DeniedError,
    NoPoolsError,
    PoolsError,
    RefusedError,
    TargetError,
)
from kvpatch.pools.ledgers import Ledgers, library
from kvpatch.pools.model import Device, Driver, Group, Pool, State, View, Way
from kvpatch.pools.ollama import Ollama
from kvpatch.pools.service import Service

__all__ = [
    "DamagedError",
    "DeniedError",
    "Device",
    "Driver",
    "Drivers",
    "Group",
    "Ledgers",
    "NoPoolsError",
    "Ollama",
    "Pool",
    "PoolsError",
    "RefusedError",
    "Service",
    "Source",
    "State",
    "TargetError",
    "View",
    "Way",
    "Wish",
    "library",
    "source",
]
