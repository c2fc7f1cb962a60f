"""Pools by the socket of kvcachedd: its JSON, its refusals, and sockets that nobody good is behind."""

from __future__ import annotations

import socket
import socketserver
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpatch.pools import (
    DeniedError,
    Drivers,
    NoPoolsError,
    PoolsError,
    RefusedError,
    Service,
    service,
    targets,
)
from tests.unit.pools.kit import BUS, Answering, answering

SLOT = {
    "slot": 3, "pid": "4711", "name": "qwen:8b", "group": "ollama", "charge": "700", "lease": "600",
    "fixed": "200", "claim": "500", "kv_mapped": "100", "weights_mapped": "300", "compute_mapped": "50",
    "kv_reserved": "4000", "context_bytes": "150", "idle": "20", "pooled": "30", "asleep": "0",
    "host_bytes": "0", "wants": "0", "limit": "20000000000", "unused_ms": "1500", "inside": 0, "queued": 0,
    "parked": 0, "leased": True, "attached": True, "controlled": True, "held_here": False,
}  # fmt: skip
WAITING = {**SLOT, "slot": 4, "wants": "80", "unused_ms": "-1", "limit": "-1", "group": "other"}


def stats(*slots: dict[str, Any], device: str = BUS, left: int = 0) -> dict[str, Any]:
    one = {
        "device": device, "ledger": f"/dev/shm/kvcached-7-{device}", "ledger_file": "1:2", "limit": "-1",
        "charge": "700", "overage": "0", "revision": 0, "slots": list(slots), "slots_left_out": left,
    }  # fmt: skip
    return {"devices": [one], "version": "0.1.0", "leases": 1, "connections": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kvcachedd.sock"


@pytest.fixture
def server(path: Path) -> Iterator[Answering]:
    with answering(lambda handler: socketserver.ThreadingUnixStreamServer(str(path), handler)) as told:
        yield told


@pytest.fixture
def asked(path: Path, drivers: Drivers) -> Service:
    return Service(path, drivers)


def test_figures(server: Answering, asked: Service) -> None:
    server.answer = lambda *_: (200, stats(SLOT, WAITING, left=2))
    view = asked.look()
    assert server.asked == [("POST", "/kvcached.v1.KVCached/GetStats", {})]
    (device,) = view.devices
    assert (device.id, device.limit, device.driver) == (BUS, None, None)
    assert (device.mapped, device.context_bytes, device.held, device.charge) == (1000, 300, 1300, 1400)
    first, second = device.pools
    assert (first.name, first.pid, first.slot, first.state) == ("qwen:8b", 4711, 3, "awake")
    assert (first.kv_mapped, first.kv_reserved, first.weights_mapped, first.spare) == (100, 4000, 300, 50)
    assert (first.limit, first.last_use_seconds) == (20 * 10**9, 1.5)
    assert (second.state, second.limit, second.last_use_seconds) == ("waiting", None, None)
    assert [(g.name, g.limit) for g in device.groups] == [("ollama", 20 * 10**9), ("other", None)]
    assert "2 processes are not listed" in view.notes[0]
    asked.require_pools()


def test_nobody_there(server: Answering, asked: Service) -> None:
    server.answer = lambda *_: (200, stats())
    assert asked.look().pools == ()
    with pytest.raises(NoPoolsError):
        asked.require_pools()


def test_limits(server: Answering, asked: Service) -> None:
    limited = {"bytes": "1000", "charge": "700", "overage": "0", "revision": 4}
    server.answer = lambda method, path, body: (200, limited if "bytes" in body else stats(SLOT, WAITING))
    (done,) = targets.set_limit_of_service(asked, "ollama", 1000, card=False, device=None)
    assert server.asked[-1][1:] == (
        "/kvcached.v1.KVCached/SetLimit",
        {"device": BUS, "group": "ollama", "bytes": "1000"},
    )
    assert (done.group, done.limit, done.revision) == ("ollama", 1000, 4)

    limited["bytes"] = "-1"
    (done,) = targets.set_limit_of_service(asked, None, None, card=True, device="0000:1b")
    assert server.asked[-1][2] == {"device": BUS, "group": "", "bytes": "-1"}
    assert (done.group, done.limit) == (None, None)
    with pytest.raises(PoolsError, match="2 groups: ollama, other"):
        targets.set_limit_of_service(asked, None, 1000, card=False, device=None)


@pytest.mark.parametrize(
    ("status", "answer", "kind", "says"),
    [
        (429, {"code": "resource_exhausted", "message": "too many"}, RefusedError, "too many"),
        (403, {"code": "permission_denied", "message": "not you"}, DeniedError, "not you"),
        (404, b"404 page not found", RefusedError, "page not found"),
        (200, b"{", PoolsError, "not JSON"),
        (200, [], PoolsError, "no object"),
        (200, {"devices": [{"device": "host"}]}, PoolsError, "not understood"),
        (200, {"devices": [{**stats()["devices"][0], "slots": [{"slot": 1}]}]}, PoolsError, "not understood"),
    ],
)
def test_answers_that_are_no_use(
    status: int, answer: Any, kind: type[PoolsError], says: str, server: Answering, asked: Service
) -> None:
    server.answer = lambda *_: (status, answer)
    with pytest.raises(kind, match=says) as caught:
        asked.look()
    assert caught.value.exit_code == 10
    assert caught.value.hint or kind is RefusedError


def test_an_endless_answer(server: Answering, asked: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpatch.pools.http.MOST_BYTES", 100)
    server.answer = lambda *_: (200, stats(SLOT))
    with pytest.raises(PoolsError, match="more than 100 bytes"):
        asked.look()


def test_no_socket(path: Path, asked: Service) -> None:
    with pytest.raises(PoolsError, match="there is no socket") as caught:
        asked.look()
    assert "kvpatch service" in str(caught.value.hint)
    path.write_text("", encoding="utf-8")
    with pytest.raises(PoolsError, match="is not a socket"):
        asked.look()


def test_a_service_that_has_ended(path: Path, asked: Service) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with pytest.raises(PoolsError, match="has ended"):
        asked.look()


def test_a_service_that_hangs(path: Path, asked: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(PoolsError, match="timed out"):
            asked.look()


def test_a_socket_of_somebody_else(
    server: Answering, asked: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is one user's, the process behind it another's."""

    class Credentials:
        size = 12

        @staticmethod
        def unpack(raw: bytes) -> tuple[int, int, int]:
            assert len(raw) == 12
            return 1, 4242, 1

    monkeypatch.setattr(service, "_CREDENTIALS", Credentials)
    with pytest.raises(DeniedError, match="served by uid 4242"):
        asked.look()
    assert server.asked == []
