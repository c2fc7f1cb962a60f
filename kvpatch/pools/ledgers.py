"""Pools by their ledger files: everything is told, and they can be commanded; the files must be ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvpatch.errors import KvpatchError, ToolchainError
from kvpatch.pools import driver, errors
from kvpatch.pools.driver import Drivers
from kvpatch.pools.files import LedgerFile
from kvpatch.pools.model import Device, Group, Pool, View, Way, state_of
from kvpatch.runtime import CallError, Kind, Ledger, Library, Slot, load


def library(build: Path | None, cache: Path | None) -> Library:
    """The library of a build, else the one in the cache. Errors as `kvpatch.runtime.load`."""
    try:
        return load(build, cache=cache)
    except ToolchainError as error:
        raise ToolchainError(
            error.message,
            hint=f"{error.hint}; or name a build that has the library: --build DIR",
            data=error.data,
        ) from error


def pool(slot: Slot, *, limit: int | None, now_ns: int) -> Pool:
    """A slot as a pool; `limit` is the one in force for its group."""
    return Pool(
        name=slot.name,
        state=state_of(
            attached=slot.attached,
            mapped=sum(slot.kind_bytes),
            asleep=slot.asleep,
            waits=bool(slot.parked or slot.wants),
            inside=slot.inside,
        ).value,
        group=slot.group,
        slot=slot.slot,
        pid=slot.pid,
        weights_mapped=slot.kind_bytes[Kind.WEIGHTS],
        weights_asleep=slot.kind_asleep[Kind.WEIGHTS],
        kv_mapped=slot.kind_bytes[Kind.KV],
        kv_reserved=slot.kind_reserved[Kind.KV],
        kv_asleep=slot.kind_asleep[Kind.KV],
        scratch_mapped=slot.kind_bytes[Kind.SCRATCH],
        spare=slot.idle + slot.pooled,
        asleep=slot.asleep,
        host_bytes=slot.host_bytes,
        claim=slot.claim,
        context_bytes=slot.context_bytes,
        fixed=slot.fixed,
        lease=slot.lease,
        charge=slot.charge,
        wants=slot.wants,
        limit=limit,
        last_use_seconds=max(0, now_ns - slot.last_use_ns) / 1e9 if slot.last_use_ns else None,
        inside=slot.inside,
        queued=slot.queued,
        parked=slot.parked,
        controlled=slot.controlled,
    )


class Opened:
    """A ledger that could be opened, and the device it is of."""

    def __init__(self, file: LedgerFile, ledger: Ledger) -> None:
        self.file = file
        self.ledger = ledger

    @property
    def path(self) -> Path:
        return self.file.path

    def device(self, gpu: Callable[[str], driver.Gpu | None], drivers: Drivers) -> Device:
        """One look at it. Raises CallError."""
        slots = self.ledger.slots()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        groups = self.groups(slots)
        limits = {group.name: group.limit for group in groups}
        pools = tuple(pool(slot, limit=limits[slot.group], now_ns=now) for slot in slots)
        return Device(
            id=self.file.device,
            ledger=str(self.path),
            limit=self.ledger.get_limit(None).limit,
            groups=groups,
            pools=pools,
            **driver.facts(self.file.device, gpu, drivers),
        )

    def groups(self, slots: Sequence[Slot]) -> tuple[Group, ...]:
        """The groups of these slots, with what is in force for each."""
        found = []
        for name in sorted({slot.group for slot in slots}):
            known = self.ledger.get_limit(name)
            found.append(Group(name=name, limit=known.limit, charge=known.charge))
        return tuple(found)


class Ledgers:
    """The ledgers of one user, open. What cannot be opened is a device with a problem."""

    way = Way.LEDGER

    def __init__(
        self,
        find: Callable[[], Sequence[LedgerFile]],
        loaded: Library,
        drivers: Drivers,
        command: str = "top",
    ) -> None:
        """Open what `find` finds; each look asks it again."""
        self.opened: list[Opened] = []
        self.failures: list[tuple[LedgerFile, KvpatchError]] = []
        self._find = find
        self._library = loaded
        self._drivers = drivers
        self._command = command
        self.refresh()

    def close(self) -> None:
        for one in self.opened:
            one.ledger.close()
        self.opened = []

    def refresh(self) -> None:
        """Open files that have come, close those that are gone. One that was replaced is both."""
        found = {file.inode: file for file in self._find()}
        for one in self.opened:
            if one.file.inode not in found:
                one.ledger.close()
        self.opened = [one for one in self.opened if one.file.inode in found]
        self.failures = [pair for pair in self.failures if found.get(pair[0].inode) == pair[0]]
        known = {one.file.inode for one in self.opened} | {file.inode for file, _ in self.failures}
        for inode, file in found.items():
            if inode in known:
                continue
            if not file.ours:
                self.failures.append((file, errors.denied(file.path, file.owner, self._command)))
            elif not file.empty:  # opening it would fill it in, and it has no slot
                try:
                    self.opened.append(Opened(file, Ledger(file.path, library=self._library)))
                except CallError as error:
                    self.failures.append((file, errors.of_file(file.path, error, self._command)))

    def look(self) -> View:
        """All of them now. Devices without a pool are in it."""
        self.refresh()
        gpu = driver.finder(self._drivers)
        devices = []
        for one in self.opened:
            try:
                devices.append(one.device(gpu, self._drivers))
            except CallError as error:
                devices.append(Device(id=one.file.device, ledger=str(one.path), problem=_line(error)))
        for file, failure in self.failures:
            if file.ours:
                devices.append(Device(id=file.device, ledger=str(file.path), problem=_line(failure)))
        strangers = sorted({errors.user_name(file.owner) for file, _ in self.failures if not file.ours})
        notes = [f"not shown: ledgers of {name}" for name in strangers]
        where = ", ".join(str(one.path) for one in self.opened)
        return View(way=self.way, where=where, devices=tuple(devices), notes=tuple(notes))

    def populated(self) -> bool:
        """Whether a process is in one of them. Raises CallError."""
        return any(one.ledger.slots() for one in self.opened)

    def require_pools(self) -> None:
        """Raise what is in the way where not one process can be seen: the first failure, ours before others'."""
        if not self.populated():
            for _, failure in sorted(self.failures, key=lambda pair: not pair[0].ours):
                raise failure


def _line(error: KvpatchError) -> str:
    return error.message + (f"; {error.hint}" if error.hint else "")
