"""The public header of libkvcached for ctypes: constants, structures, prototypes.

tests/unit/runtime/test_header.py holds all of it against the header: sizes, offsets and values as a C compiler sees
them, and every prototype word for word.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from enum import IntEnum
from typing import Any

ABI = 4
UINT64_MAX = 2**64 - 1
NAME_MAX = 63
GROUP_MAX = 31
PATH_MAX = 128
DEVICE_HOST = -1
NO_CONTROL = 1


class Backend(IntEnum):
    """Which memory a context is of (kvcached_backend)."""

    HOST = 0
    CUDA = 1


class LogLevel(IntEnum):
    """Weight of a log line (kvcached_log_level)."""

    ERROR = 0
    WARN = 1
    INFO = 2
    DEBUG = 3


class Lookahead(IntEnum):
    """Who maps pages ahead of need (kvcached_lookahead)."""

    AUTO = 0
    THREAD = 1
    INLINE = 2
    OFF = 3


class Kind(IntEnum):
    """What a region holds, and so what sleep does with it (kvcached_kind)."""

    KV = 0
    WEIGHTS = 1
    SCRATCH = 2


class LimitResult(IntEnum):
    """What became of a limit that was set (kvcached_limit_result)."""

    APPLIED = 0
    DEFERRED = 1
    STALE = 2
    CONFLICT = 3


class Command(IntEnum):
    """What a process can be told to do (kvcached_command)."""

    TRIM = 1
    SLEEP = 2
    WAKE = 3
    REFUSE = 4


class Event(IntEnum):
    """What the event function hears of (kvcached_event)."""

    SLEEPING = 1
    SLEPT = 2
    WOKE = 3
    TRIMMED = 4


LOG_FUNCTION = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
RELOAD_FUNCTION = CFUNCTYPE(c_int, c_void_p, c_void_p)


class StatsStruct(ctypes.Structure):
    """kvcached_stats_t."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("reserved", c_uint64),
        ("mapped", c_uint64),
        ("idle", c_uint64),
        ("page_size", c_uint64),
        ("limit", c_uint64),
        ("group_charge", c_uint64),
        ("ensures", c_uint64),
        ("releases", c_uint64),
        ("trims", c_uint64),
        ("limit_failures", c_uint64),
        ("kind_mapped", c_uint64 * 3),
        ("ready", c_uint64),
        ("pooled", c_uint64),
        ("asleep", c_uint64),
        ("host_bytes", c_uint64),
        ("host_pinned", c_uint64),
        ("host_limit", c_uint64),
        ("card_limit", c_uint64),
        ("card_charge", c_uint64),
        ("sleeps", c_uint64),
        ("wakes", c_uint64),
        ("last_sleep_ns", c_uint64),
        ("last_wake_ns", c_uint64),
        ("device_calls", c_uint64),
        ("last_inside_ns", c_uint64),
        ("kind_asleep", c_uint64 * 3),
        ("fixed", c_uint64),
        ("context_bytes", c_uint64),
        ("wants", c_uint64),
        ("parks", c_uint64),
    ]


EVENT_FUNCTION = CFUNCTYPE(None, c_int, POINTER(StatsStruct), c_void_p)


class OptionsStruct(ctypes.Structure):
    """kvcached_options_t."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("backend", c_int),
        ("page_size", c_size_t),
        ("limit", c_uint64),
        ("name", c_char_p),
        ("group", c_char_p),
        ("ledger_path", c_char_p),
        ("slot", c_int),
        ("fixed", c_uint64),
        ("log", LOG_FUNCTION),
        ("log_user", c_void_p),
        ("device", c_int),
        ("pci_bus_id", c_char_p),
        ("large_page", c_size_t),
        ("pool_limit", c_uint64),
        ("lookahead", c_int),
        ("host_limit", c_uint64),
        ("headroom", c_uint64),
        ("room_wait_ms", c_uint32),
        ("flags", c_uint32),
        ("event", EVENT_FUNCTION),
        ("event_user", c_void_p),
        ("idle_trim_ms", c_uint32),
        ("group_wait_ms", c_uint32),
    ]


class LimitStruct(ctypes.Structure):
    """kvcached_limit_t."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("result", c_int),
        ("revision", c_uint32),
        ("limit", c_uint64),
        ("charge", c_uint64),
        ("overage", c_uint64),
    ]


class SlotStruct(ctypes.Structure):
    """kvcached_slot_t."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("slot", c_int),
        ("pid", c_int64),
        ("name", c_char * (NAME_MAX + 1)),
        ("group", c_char * (GROUP_MAX + 1)),
        ("lease", c_uint64),
        ("fixed", c_uint64),
        ("claim", c_uint64),
        ("reserved", c_uint64),
        ("charge", c_uint64),
        ("leased", c_int),
        ("attached", c_int),
        ("kind_bytes", c_uint64 * 3),
        ("idle", c_uint64),
        ("pooled", c_uint64),
        ("asleep", c_uint64),
        ("host_bytes", c_uint64),
        ("limit", c_uint64),
        ("last_use_ns", c_uint64),
        ("woke_ns", c_uint64),
        ("inside", c_uint32),
        ("queued", c_uint32),
        ("controlled", c_int),
        ("wants", c_uint64),
        ("wants_since_ns", c_uint64),
        ("context_bytes", c_uint64),
        ("kind_reserved", c_uint64 * 3),
        ("kind_asleep", c_uint64 * 3),
        ("parked", c_uint32),
    ]


class RangeStruct(ctypes.Structure):
    """kvcached_range_t."""

    _fields_ = [
        ("off", c_size_t),
        ("len", c_size_t),
    ]


_CTX = _REGION = _LEDGER = c_void_p
# Function (without kvcached_) to its result and its arguments.
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "abi_version": (c_uint32, []),
    "version": (c_char_p, []),
    "strerror": (c_char_p, [c_int]),
    "err_name": (c_char_p, [c_int]),
    "last_error": (c_char_p, []),
    "init": (_CTX, [c_int]),
    "shutdown": (None, [_CTX]),
    "alloc": (c_void_p, [_CTX, c_size_t]),
    "free": (None, [_CTX, c_void_p]),
    "available": (c_size_t, [_CTX]),
    "set_limit": (None, [_CTX, c_size_t]),
    "options_init": (None, [POINTER(OptionsStruct)]),
    "open": (c_int, [POINTER(OptionsStruct), POINTER(_CTX)]),
    "page_size": (c_size_t, [_CTX]),
    "set_fixed": (c_int, [_CTX, c_uint64]),
    "enter": (c_int, [_CTX]),
    "leave": (c_int, [_CTX]),
    "set_queued": (c_int, [_CTX, c_uint32]),
    "reserve": (c_int, [_CTX, c_int, c_size_t, POINTER(_REGION)]),
    "unreserve": (None, [_REGION]),
    "region_base": (c_void_p, [_REGION]),
    "region_size": (c_size_t, [_REGION]),
    "region_page_size": (c_size_t, [_REGION]),
    "ensure": (c_int, [_REGION, c_size_t, c_size_t]),
    "ensure_ranges": (c_int, [_REGION, POINTER(RangeStruct), c_size_t]),
    "prepare": (c_int, [_REGION, c_size_t, c_size_t]),
    "prepare_ranges": (c_int, [_REGION, POINTER(RangeStruct), c_size_t]),
    "release": (c_int, [_REGION, c_size_t, c_size_t]),
    "trim": (c_int, [_CTX, c_size_t, POINTER(c_size_t)]),
    "mapped_run": (c_int, [_REGION, c_size_t, c_size_t, POINTER(c_size_t), POINTER(c_int)]),
    "read": (c_int, [_REGION, c_size_t, c_void_p, c_size_t]),
    "write": (c_int, [_REGION, c_size_t, c_void_p, c_size_t]),
    "clear": (c_int, [_REGION, c_size_t, c_size_t]),
    "set_reload": (c_int, [_REGION, RELOAD_FUNCTION, c_void_p]),
    "prepare_sleep": (c_int, [_CTX, c_uint32]),
    "sleep": (c_int, [_CTX, c_uint32, c_uint32, POINTER(c_size_t)]),
    "wake": (c_int, [_CTX, c_uint32]),
    "trim_host": (c_int, [_CTX, c_int, POINTER(c_size_t)]),
    "stats": (c_int, [_CTX, POINTER(StatsStruct)]),
    "region_stats": (c_int, [_REGION, POINTER(StatsStruct)]),
    "device_memory": (c_int, [_CTX, POINTER(c_uint64), POINTER(c_uint64)]),
    "ledger_default_path": (c_int, [c_char_p, c_char_p, c_size_t]),
    "ledger_open": (c_int, [c_char_p, POINTER(_LEDGER)]),
    "ledger_close": (None, [_LEDGER]),
    "ledger_path": (c_char_p, [_LEDGER]),
    "ledger_lease": (
        c_int,
        [_LEDGER, c_char_p, c_char_p, c_uint64, c_uint64, c_uint64, POINTER(c_int)],
    ),
    "ledger_unlease": (c_int, [_LEDGER, c_int]),
    "ledger_set_limit": (c_int, [_LEDGER, c_char_p, c_uint64, c_uint32, POINTER(LimitStruct)]),
    "ledger_get_limit": (c_int, [_LEDGER, c_char_p, POINTER(LimitStruct)]),
    "ledger_command": (c_int, [_LEDGER, c_int, c_int, c_uint32, POINTER(c_uint64)]),
    "ledger_wait": (c_int, [_LEDGER, POINTER(c_uint32), c_uint32]),
    "ledger_slots": (c_int, [_LEDGER, POINTER(SlotStruct), c_size_t, POINTER(c_size_t)]),
}
