"""Pools by the socket of kvcachedd: everything is told, and limits can be set; it has no commands."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpatch.pools import driver, errors
from kvpatch.pools.driver import Drivers
from kvpatch.pools.http import AnswerError, UnixConnection, exchange
from kvpatch.pools.model import Device, Group, Pool, View, Way, state_of

VARIABLE = "OLLAMA_KVCACHED_SOCKET"
_SERVICE = "/kvcached.v1.KVCached/"
_SECONDS = 5.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class StrangerError(OSError):
    """The process behind the socket is not of the user that the socket's file belongs to."""


class _Connection(UnixConnection):
    def __init__(self, path: Path, *, owner: int) -> None:
        super().__init__(path, timeout=_SECONDS)
        self._owner = owner

    def check(self, stream: socket.socket) -> None:
        raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(raw)
        # 0: a socket that systemd listens on for the service.
        if uid not in (self._owner, 0):
            raise StrangerError(
                0, f"it is served by {errors.user_name(uid)}, its file is {errors.user_name(self._owner)}'s"
            )


class Service:
    """kvcachedd, asked over its socket."""

    way = Way.SOCKET

    def __init__(self, path: Path, drivers: Drivers) -> None:
        self.path = path
        self._drivers = drivers

    def close(self) -> None:
        """Nothing is kept open."""

    def look(self) -> View:
        """What it sees now. Raises PoolsError."""
        stats = self._call("GetStats", {})
        gpu = driver.finder(self._drivers)
        try:
            devices = tuple(
                _device(told, **driver.facts(str(told["device"]), gpu, self._drivers))
                for told in stats["devices"]
            )
            left = sum(int(told.get("slots_left_out", 0)) for told in stats["devices"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._odd(f"{type(error).__name__} {error}") from error
        notes = [f"{left} processes are not listed: the service bounds its answers"] if left else []
        return View(way=self.way, where=str(self.path), devices=devices, notes=tuple(notes))

    def require_pools(self) -> None:
        """Raise NoPoolsError where nothing holds memory, PoolsError where nobody answers."""
        if not self.look().pools:
            raise errors.NoPoolsError(
                f"no process holds memory in the ledgers of the service at {self.path}",
                hint="start one: an elastic `ollama serve` or llama-server with a model",
            )

    def set_limit(self, device: str, group: str | None, limit: int | None) -> dict[str, Any]:
        """Set it: what is in force now, as LimitResponse has it, in numbers. Raises PoolsError."""
        wanted = {"device": device, "group": group or "", "bytes": str(-1 if limit is None else limit)}
        answer = self._call("SetLimit", wanted)
        try:
            return {name: int(answer[name]) for name in ("bytes", "charge", "overage", "revision")}
        except (KeyError, TypeError, ValueError) as error:
            raise self._odd(f"{type(error).__name__} {error}") from error

    def _call(self, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise errors.PoolsError(
                f"there is no socket {self.path}",
                hint="start the service (kvpatch service), or name its socket: --socket PATH",
            ) from None
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from error
        if not stat.S_ISSOCK(status.st_mode):
            raise errors.PoolsError(f"{self.path} is not a socket", hint="name the service's: --socket PATH")
        try:
            answer = exchange(_Connection(self.path, owner=status.st_uid), "POST", _SERVICE + method, body)
        except AnswerError as error:
            raise self._failure(method, error, status) from error
        if not isinstance(answer, dict):
            raise self._odd("no object")
        return answer

    def _failure(self, method: str, error: AnswerError, status: os.stat_result) -> errors.PoolsError:
        code = error.body.get("code") if isinstance(error.body, dict) else None
        if isinstance(error.cause, PermissionError) or code in ("permission_denied", "unauthenticated"):
            owner = errors.user_name(status.st_uid)
            return errors.DeniedError(
                f"the service at {self.path} does not let this user {'set limits' if method == 'SetLimit' else 'in'}: "
                f"{error}",
                hint=f"run it as {owner} or root (sudo -u {owner} kvpatch ...), or join the socket's group",
                data={"socket": str(self.path), "owner": owner},
            )
        if isinstance(error.cause, ConnectionRefusedError):
            return errors.PoolsError(
                f"nobody serves {self.path}: the service that made it has ended",
                hint="start it again (kvpatch service), or look without it: --by ledger",
            )
        if isinstance(error.cause, StrangerError):
            return errors.DeniedError(
                f"the socket {self.path} is not to be trusted: {error}", hint=f"look at it: ls -l {self.path}"
            )
        if error.status == 200:
            return self._odd(str(error))
        if error.status:
            return errors.RefusedError(
                f"the service at {self.path} refused {method}: {error}", data={"error": code or ""}
            )
        return self._unreachable(str(error))

    def _unreachable(self, reason: str) -> errors.PoolsError:
        return errors.PoolsError(
            f"the service at {self.path} cannot be asked: {reason}",
            hint="is it running, and of this version? Without it: --by ledger",
        )

    def _odd(self, reason: str) -> errors.PoolsError:
        return errors.PoolsError(
            f"the answer of {self.path} is not understood ({reason})",
            hint="the service has to be of the same version as this kvpatch",
        )


def _device(told: Mapping[str, Any], **facts: Any) -> Device:
    slots: Sequence[Mapping[str, Any]] = told["slots"]
    pools = tuple(_pool(slot) for slot in slots)
    groups = []
    for name in sorted({pool.group or "" for pool in pools}):
        members = [pool for pool in pools if pool.group == name]
        limits = [pool.limit for pool in members if pool.limit is not None]
        # A process that came before the limit was lowered may not have looked yet.
        groups.append(
            Group(name=name, limit=min(limits, default=None), charge=sum(pool.charge for pool in members))
        )
    return Device(
        id=str(told["device"]),
        ledger=str(told["ledger"]),
        limit=_none(told["limit"]),
        groups=tuple(groups),
        pools=pools,
        **facts,
    )


def _pool(slot: Mapping[str, Any]) -> Pool:
    def n(name: str) -> int:
        return int(slot[name])

    unused = n("unused_ms")
    mapped = n("kv_mapped") + n("weights_mapped") + n("compute_mapped")
    return Pool(
        name=str(slot["name"]),
        state=state_of(
            attached=bool(slot["attached"]),
            mapped=mapped,
            asleep=n("asleep"),
            waits=bool(n("parked") or n("wants")),
            inside=n("inside"),
        ).value,
        group=str(slot["group"]),
        slot=n("slot"),
        pid=n("pid"),
        weights_mapped=n("weights_mapped"),
        kv_mapped=n("kv_mapped"),
        kv_reserved=n("kv_reserved"),
        scratch_mapped=n("compute_mapped"),
        spare=n("idle") + n("pooled"),
        asleep=n("asleep"),
        host_bytes=n("host_bytes"),
        claim=n("claim"),
        context_bytes=n("context_bytes"),
        fixed=n("fixed"),
        lease=n("lease"),
        charge=n("charge"),
        wants=n("wants"),
        limit=_none(slot["limit"]),
        last_use_seconds=None if unused < 0 else unused / 1000,
        inside=n("inside"),
        queued=n("queued"),
        parked=n("parked"),
        controlled=bool(slot["controlled"]),
    )


def _none(value: Any) -> int | None:
    """A limit: negative is none."""
    number = int(value)
    return None if number < 0 else number
