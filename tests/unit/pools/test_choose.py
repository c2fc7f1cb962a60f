"""Which way is taken, and what is said where no way shows anything."""

from __future__ import annotations

import os
import socketserver
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvpatch.errors import KvpatchError, LibraryError, UsageError
from kvpatch.pools import (
    DamagedError,
    DeniedError,
    Drivers,
    NoPoolsError,
    PoolsError,
    Source,
    Way,
    Wish,
    choose,
)
from kvpatch.runtime import Ledger, Library
from tests.unit.pools.kit import Answering, Start, answering
from tests.unit.pools.test_ollama import MODEL
from tests.unit.pools.test_service import SLOT, stats

NOBODY = "127.0.0.1:1"


class World:
    """A folder of ledgers, a service and an Ollama; `way` is the one that is taken."""

    def __init__(self, folder: Path, lib: Library, drivers: Drivers, stack: ExitStack) -> None:
        self.folder, self.lib, self.drivers, self.stack = folder, lib, drivers, stack
        self.environ = {"OLLAMA_HOST": NOBODY}

    def serve(self) -> Answering:
        path = self.folder.parent / "socket"
        self.environ["OLLAMA_KVCACHED_SOCKET"] = str(path)
        told = self.stack.enter_context(
            answering(lambda handler: socketserver.ThreadingUnixStreamServer(str(path), handler))
        )
        told.answer = lambda *_: (200, stats(SLOT))
        return told

    def ollama(self) -> Answering:
        told = self.stack.enter_context(
            answering(lambda handler: socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler))
        )
        told.answer = lambda *_: (200, {"models": [MODEL]})
        self.environ["OLLAMA_HOST"] = f"127.0.0.1:{told.address[1]}"
        return told

    def source(self, wish: Wish | None = None) -> Source:
        found = choose.source(
            wish or Wish(), lambda: self.lib, self.drivers, environ=self.environ, folder=self.folder
        )
        self.stack.callback(found.close)
        return found

    def way(self, wish: Wish | None = None) -> Way:
        return self.source(wish).way

    def failure(self, wish: Wish | None = None) -> KvpatchError:
        with pytest.raises(KvpatchError) as caught:
            self.source(wish)
        assert caught.value.hint
        return caught.value


@pytest.fixture
def world(tmp_path: Path, lib: Library, drivers: Drivers) -> Iterator[World]:
    (tmp_path / "shm").mkdir()
    with ExitStack() as stack:
        yield World(tmp_path / "shm", lib, drivers, stack)


def test_ledger_then_service_then_ollama(world: World, start: Start) -> None:
    assert "no ledger file" in world.failure().message
    ledger = world.folder / "kvcached-0-host"
    Ledger(ledger, library=world.lib).close()
    assert "nobody in them" in world.failure().message
    world.ollama()
    assert world.way() is Way.OLLAMA
    served = world.serve()
    assert world.way() is Way.SOCKET
    served.answer = lambda *_: (200, stats())
    assert world.way() is Way.OLLAMA
    start(ledger=ledger)
    assert world.way() is Way.LEDGER
    assert world.way(Wish(by="socket")) is Way.SOCKET
    assert world.way(Wish(by="ollama")) is Way.OLLAMA


def test_what_goes_with_a_way_asks_for_it(world: World, tmp_path: Path) -> None:
    ledger = tmp_path / "mine"
    Ledger(ledger, library=world.lib).close()
    assert world.way(Wish(ledgers=(ledger,))) is Way.LEDGER  # with nobody in it
    assert world.way(Wish(socket=tmp_path / "s")) is Way.SOCKET
    assert world.way(Wish(ollama=NOBODY)) is Way.OLLAMA
    with pytest.raises(UsageError, match="--by ledger and --socket are two ways"):
        world.source(Wish(by="ledger", socket=tmp_path / "s"))
    with pytest.raises(UsageError, match="none of ledger, socket, ollama"):
        world.source(Wish(by="smoke"))
    with pytest.raises(UsageError, match="--socket PATH"):
        world.source(Wish(by="socket"))


def test_the_reasons_of_every_way(world: World) -> None:
    world.environ["OLLAMA_KVCACHED_SOCKET"] = "/nowhere/kvcachedd.sock"
    error = world.failure()
    assert isinstance(error, NoPoolsError)
    for part in ("no ledger file", "no socket /nowhere/kvcachedd.sock", f"http://{NOBODY}/api/ps"):
        assert part in error.message
    assert isinstance(world.failure(Wish(by="ledger")), NoPoolsError)


def test_a_named_file_that_is_not_there(world: World) -> None:
    assert "there is no ledger /nowhere" in world.failure(Wish(ledgers=(Path("/nowhere"),))).message


def test_another_users_ledger(world: World, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a service account: its Ollama may be asked all the same."""
    start(ledger=world.folder / "kvcached-998-host")
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 4242)
    assert isinstance(world.failure(), DeniedError)
    sleep = world.failure(Wish(by="ledger", command="sleep"))
    assert isinstance(sleep, DeniedError)
    assert "kvpatch sleep" in str(sleep.hint)
    world.ollama()
    assert world.way() is Way.OLLAMA


def test_a_torn_file_says_more_than_that_nobody_answers(world: World) -> None:
    (world.folder / "kvcached-0-host").write_bytes(b"torn")
    (world.folder / "kvcached-0-host").chmod(0o600)
    assert isinstance(world.failure(), DamagedError)
    world.ollama()
    assert world.way() is Way.OLLAMA


def test_a_library_that_cannot_be_loaded(world: World) -> None:
    Ledger(world.folder / "kvcached-0-host", library=world.lib).close()

    def load() -> Library:
        raise LibraryError("its ABI is 3, this kvpatch needs 4", hint="take another")

    with pytest.raises(LibraryError, match="its ABI is 3") as caught:
        choose.source(Wish(), load, world.drivers, environ=world.environ, folder=world.folder)
    assert not isinstance(caught.value, PoolsError)
