"""What a process holds by the ledger: exact, of each kind, and known without asking the process."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from kvpatch import runtime
from kvpatch.errors import KvpatchError
from kvpatch.runtime import Kind
from kvpatch.smoke.install import Install
from kvpatch.smoke.report import CheckFailed


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdings:
    """Bytes: mapped of each kind, `idle` of them, `asleep` ones without memory, and what counts towards the limit."""

    kv: int
    weights: int
    compute: int
    idle: int
    asleep: int
    charge: int


@functools.cache
def library(root: Path) -> runtime.Library:
    """That of the build: another one's ledger may be of another version."""
    return runtime.load(root)


def holdings(install: Install, ledger: Path, pid: int) -> Holdings:
    """Raises CheckFailed when the ledger cannot be read, or the process is not in it."""
    try:
        with runtime.Ledger(ledger, library=library(install.root)) as opened:
            found = [slot for slot in opened.slots() if slot.pid == pid]
    except KvpatchError as error:
        raise CheckFailed(f"the ledger {ledger} cannot be read: {error}") from error
    if len(found) != 1:
        raise CheckFailed(f"process {pid} has {len(found)} slots in the ledger {ledger}, not one")
    slot = found[0]
    return Holdings(
        kv=slot.kind_bytes[Kind.KV],
        weights=slot.kind_bytes[Kind.WEIGHTS],
        compute=slot.kind_bytes[Kind.SCRATCH],
        idle=slot.idle,
        asleep=slot.asleep,
        charge=slot.charge,
    )
