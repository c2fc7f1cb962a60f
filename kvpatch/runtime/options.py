"""How a context is opened, and its figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpatch.errors import UsageError
from kvpatch.runtime.binding import INT_MAX, UINT32_MAX, frozen, limit_or_none, member, number, text
from kvpatch.runtime.structures import (
    EVENT_FUNCTION,
    LOG_FUNCTION,
    NO_CONTROL,
    UINT64_MAX,
    Backend,
    Event,
    LogLevel,
    Lookahead,
    OptionsStruct,
    StatsStruct,
)


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
    group_wait_ms: int | None = None
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
    fixed: int
    context_bytes: int
    wants: int
    parks: int


def fill(struct: OptionsStruct, options: Options) -> None:
    """Put what `options` says over the library's defaults."""
    struct.backend = int(member("backend", Backend, options.backend))
    for name in ("page_size", "large_page", "limit", "fixed", "pool_limit", "host_limit", "headroom"):
        value = getattr(options, name)
        if value is not None:
            setattr(struct, name, number(name, value, UINT64_MAX))
    for name in ("room_wait_ms", "idle_trim_ms", "group_wait_ms"):
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
            event(Event(what), figures(now.contents))

        struct.event = EVENT_FUNCTION(tell)


def figures(struct: StatsStruct) -> Stats:
    """What a structure of the library says."""
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
