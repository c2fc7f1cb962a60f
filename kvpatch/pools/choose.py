"""The way to the figures: the one that was asked for, else the first that shows something."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvpatch.errors import KvpatchError, UsageError
from kvpatch.pools import errors, files
from kvpatch.pools.driver import Drivers
from kvpatch.pools.ledgers import Ledgers
from kvpatch.pools.model import Way
from kvpatch.pools.ollama import DEFAULT_PORT, Ollama
from kvpatch.pools.service import VARIABLE as SOCKET_VARIABLE
from kvpatch.pools.service import Service
from kvpatch.runtime import Library

HOST_VARIABLE = "OLLAMA_HOST"
Source = Ledgers | Service | Ollama


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What the user said; nothing: the environment and what there is decide. `command` is named in hints."""

    by: str | None = None
    ledgers: tuple[Path, ...] = ()
    socket: Path | None = None
    ollama: str | None = None
    command: str = "top"

    def way(self) -> Way | None:
        """The way that was asked for, by name or by what goes with it. Raises UsageError for two of them."""
        implied = [
            (Way.LEDGER, "--ledger", bool(self.ledgers)),
            (Way.SOCKET, "--socket", self.socket is not None),
            (Way.OLLAMA, "--ollama", self.ollama is not None),
        ]
        said = [(way, option) for way, option, given in implied if given]
        if self.by is not None:
            try:
                said.insert(0, (Way(self.by), f"--by {self.by}"))
            except ValueError:
                raise UsageError(
                    f"--by {self.by!r} is none of {', '.join(way.value for way in Way)}"
                ) from None
        if len({way for way, _ in said}) > 1:
            raise UsageError(
                f"{said[0][1]} and {said[1][1]} are two ways to the figures", hint="give one of them"
            )
        return said[0][0] if said else None


def source(
    wish: Wish,
    load: Callable[[], Library],
    drivers: Drivers,
    *,
    environ: Mapping[str, str] = os.environ,
    folder: Path = files.LEDGER_DIR,
) -> Source:
    """What answers, open. Raises PoolsError where there is nothing to see, with what each way ran into.

    Without a wish: our ledgers where a process is in one; else the service, if its socket is known; else an Ollama that
    answers. A ledger named by the user is taken with nobody in it, too.
    """
    way = wish.way()
    if way is Way.SOCKET:
        return Service(_socket(wish, environ), drivers)
    if way is Way.OLLAMA:
        return Ollama(_host(wish, environ))
    absent = files.missing(wish.ledgers)
    if absent:
        raise errors.NoPoolsError(
            f"there is no ledger {absent[0]}",
            hint="a process that maps memory makes it; `ls /dev/shm/kvcached-*`",
        )

    def find() -> tuple[files.LedgerFile, ...]:
        return files.find(wish.ledgers, environ=environ, folder=folder)

    found = find()
    tried: list[KvpatchError] = []
    try:
        ledgers = _ledgers(wish, found, lambda: Ledgers(find, load(), drivers, wish.command))
        if ledgers is not None:
            return ledgers
    except KvpatchError as error:
        tried.append(error)
    if way is None:
        others: list[Source] = [Ollama(_host(wish, environ))]
        if environ.get(SOCKET_VARIABLE):
            others.insert(0, Service(Path(environ[SOCKET_VARIABLE]), drivers))
        for other in others:
            try:
                other.require_pools()
                return other
            except errors.PoolsError as error:
                tried.append(error)
    raise _nothing(found, tried)


def _ledgers(
    wish: Wish, found: tuple[files.LedgerFile, ...], open_all: Callable[[], Ledgers]
) -> Ledgers | None:
    """The ledgers, if somebody is in them or the user named them. Raises what is in the way."""
    if not found:
        return None
    if not any(file.ours for file in found):  # nothing that the library could open
        raise errors.denied(found[0].path, found[0].owner, wish.command)
    ledgers = open_all()
    try:
        ledgers.require_pools()
        if wish.ledgers or ledgers.populated():
            return ledgers
    except BaseException:
        ledgers.close()
        raise
    ledgers.close()
    return None


def _nothing(found: tuple[files.LedgerFile, ...], tried: list[KvpatchError]) -> KvpatchError:
    """The error where no way shows a pool: what is wrong here says more than that nobody answers."""
    for error in tried:
        if not isinstance(error, errors.PoolsError):  # the library itself
            return error
    for kind in (errors.DamagedError, errors.DeniedError):
        for error in tried:
            if isinstance(error, kind):
                return error
    looked = f"{len(found)} ledger files, nobody in them" if found else "no ledger file in /dev/shm"
    reasons = "; ".join([looked, *(error.message for error in tried)])
    return errors.NoPoolsError(
        f"there are no running pools ({reasons})",
        hint="start an elastic server: OLLAMA_KVCACHED_ENABLED=true ollama serve, then load a model; a service or "
        f"another Ollama is named by --socket PATH ({SOCKET_VARIABLE}), --ollama HOST:PORT ({HOST_VARIABLE})",
        data={"looked": [str(file.path) for file in found], "reasons": [error.message for error in tried]},
    )


def _socket(wish: Wish, environ: Mapping[str, str]) -> Path:
    if wish.socket is not None:
        return wish.socket
    if environ.get(SOCKET_VARIABLE):
        return Path(environ[SOCKET_VARIABLE])
    raise UsageError("which socket? --by socket needs --socket PATH", hint=f"or set {SOCKET_VARIABLE}")


def _host(wish: Wish, environ: Mapping[str, str]) -> str:
    return wish.ollama or environ.get(HOST_VARIABLE) or f"127.0.0.1:{DEFAULT_PORT}"
