"""What is looked at, whichever way it was read: pools (a process's share of a device), devices, one look at all.

Amounts are bytes. None: this way of looking does not tell it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Way(str, Enum):
    """How the figures are had."""

    LEDGER = "ledger"
    SOCKET = "socket"
    OLLAMA = "ollama"


class State(str, Enum):
    """What a pool is doing."""

    LEASED = "leased"  # memory is set aside for a process to come
    AWAKE = "awake"
    BUSY = "busy"  # awake, and in use now
    WAITING = "waiting"  # calls of it wait until there is room
    PARTLY = "partly asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


def state_of(*, attached: bool, mapped: int, asleep: int, waits: bool, inside: int) -> State:
    """What a process is doing, by its slot: bytes that are mapped and that sleep, threads at work."""
    if not attached:
        return State.LEASED
    if waits:
        return State.WAITING
    if asleep and inside:
        return State.WAKING
    if asleep:
        return State.PARTLY if mapped else State.ASLEEP
    return State.BUSY if inside else State.AWAKE


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """What one process holds on one device."""

    name: str
    state: str
    group: str | None = None
    slot: int | None = None
    pid: int | None = None
    weights_mapped: int = 0
    weights_asleep: int | None = None
    kv_mapped: int = 0
    kv_reserved: int | None = None
    kv_asleep: int | None = None
    scratch_mapped: int | None = None
    spare: int | None = None  # a trim would give it back
    asleep: int | None = None
    host_bytes: int = 0
    claim: int | None = None  # all that it holds through the library, spare memory included
    context_bytes: int | None = None  # measured
    fixed: int | None = None  # charged for what is held outside the library
    lease: int = 0
    charge: int = 0
    wants: int | None = None  # bytes that calls which wait are short of
    limit: int | None = (
        None  # set in the ledger; None: none was, and one of the process's own holds, if it has one
    )
    last_use_seconds: float | None = None  # ago; None: never, or not known
    inside: int | None = None
    queued: int | None = None
    parked: int | None = None
    controlled: bool | None = None  # it answers commands

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The pools under one limit."""

    name: str
    limit: int | None
    charge: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """A device's memory as its driver tells it, for all processes."""

    used: int
    total: int
    source: str  # NVML, nvidia-smi, /proc/meminfo

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device's pools. `problem` says why they could not be read."""

    id: str  # host, the UUID of a GPU, its PCI bus id; "all" where the devices are not told apart
    name: str = ""
    ledger: str | None = None
    limit: int | None = None  # of all groups together
    groups: tuple[Group, ...] = ()
    pools: tuple[Pool, ...] = ()
    driver: Driver | None = None
    problem: str | None = None

    @property
    def mapped(self) -> int | None:
        """Held through the library. None: not told."""
        claims = [pool.claim for pool in self.pools]
        return None if None in claims else sum(claim or 0 for claim in claims)

    @property
    def context_bytes(self) -> int:
        """The contexts that were measured."""
        return sum(pool.context_bytes or 0 for pool in self.pools)

    @property
    def held(self) -> int | None:
        """What the processes hold in all: through the library, and their contexts (measured, else as charged)."""
        mapped = self.mapped
        if mapped is None:
            return None
        return mapped + sum(pool.context_bytes or pool.fixed or 0 for pool in self.pools)

    @property
    def charge(self) -> int:
        return sum(pool.charge for pool in self.pools)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "ledger": self.ledger,
            "ledger_total": self.mapped,
            "context_bytes": self.context_bytes,
            "held": self.held,
            "charge": self.charge,
            "limit": self.limit,
            "groups": [group.to_json() for group in self.groups],
            "driver": None if self.driver is None else self.driver.to_json(),
            "driver_used": None if self.driver is None else self.driver.used,
            "problem": self.problem,
            "pools": [pool.to_json() for pool in self.pools],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One look. `where` names what was asked: files, a socket, an address. `notes` are for the user."""

    way: Way
    where: str
    devices: tuple[Device, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def pools(self) -> tuple[Pool, ...]:
        return tuple(pool for device in self.devices for pool in device.pools)

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.way.value,
            "where": self.where,
            "notes": list(self.notes),
            "devices": [device.to_json() for device in self.devices],
        }
