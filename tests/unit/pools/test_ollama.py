"""Pools as /api/ps shows them, and servers that show none."""

from __future__ import annotations

import socketserver
from collections.abc import Iterator
from typing import Any

import pytest

from kvpatch.pools import NoPoolsError, Ollama, PoolsError, ollama
from tests.unit.pools.kit import Answering, answering

STATUS = {
    "state": "asleep", "kv_mapped": 0, "kv_reserved": 4000, "weights_mapped": 0, "context_bytes": 500,
    "host_bytes": 900, "limit": 20 * 10**9, "lease": 0, "charge": 500,
}  # fmt: skip
MODEL = {"name": "qwen:8b", "model": "qwen:8b", "size": 1, "size_vram": 0, "kvcached": STATUS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:11434", ("http", "127.0.0.1", 11434)),
        ("0.0.0.0", ("http", "127.0.0.1", 11434)),
        (":8080", ("http", "127.0.0.1", 8080)),
        ("http://box", ("http", "box", 80)),
        ("https://box/", ("https", "box", 443)),
        ("HTTP://box:81/v1", ("http", "box", 81)),
        ("[::1]:81", ("http", "::1", 81)),
        ("::", ("http", "::1", 11434)),
        (' "box:81" ', ("http", "box", 81)),
    ],
)
def test_addresses(text: str, expected: tuple[str, str, int]) -> None:
    assert ollama.address(text) == expected


@pytest.mark.parametrize("text", ["ftp://box", "box:port", "box:99999"])
def test_no_address(text: str) -> None:
    with pytest.raises(PoolsError) as caught:
        ollama.address(text)
    assert caught.value.hint is not None


@pytest.fixture
def server() -> Iterator[Answering]:
    with answering(lambda handler: socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)) as told:
        yield told


@pytest.fixture
def asked(server: Answering) -> Ollama:
    return Ollama(f"127.0.0.1:{server.address[1]}")


def test_models(server: Answering, asked: Ollama) -> None:
    awake = {"name": "b", "kvcached": {**STATUS, "state": "awake", "kv_mapped": 7, "limit": None}}
    server.answer = lambda *_: (200, {"models": [MODEL, awake]})
    view = asked.look()
    assert server.asked == [("GET", "/api/ps", None)]
    (device,) = view.devices
    assert (device.id, device.mapped, device.held, device.charge) == ("all", None, None, 1000)
    first, second = device.pools
    assert (first.name, first.state, first.limit) == ("qwen:8b", "asleep", 20 * 10**9)
    assert (first.host_bytes, first.context_bytes, first.kv_reserved) == (900, 500, 4000)
    assert (first.pid, first.slot, first.claim) == (None, None, None)
    assert (second.kv_mapped, second.limit) == (7, None)
    assert "read only" in view.notes[0]


def test_fields_of_an_earlier_build(server: Answering, asked: Ollama) -> None:
    status = {"state": "leased", "kv_mapped": 0, "lease": 5, "charge": 5, "limit": 2**64 - 1}
    server.answer = lambda *_: (200, {"models": [{"name": "a", "kvcached": status}]})
    (pool,) = asked.look().pools
    assert (pool.kv_reserved, pool.weights_mapped, pool.limit, pool.lease) == (None, 0, None, 5)


@pytest.mark.parametrize("models", [[], None])
def test_no_model_is_loaded(models: Any, server: Answering, asked: Ollama) -> None:
    server.answer = lambda *_: (200, {"models": models})
    assert asked.look().pools == ()
    with pytest.raises(NoPoolsError, match="no model loaded"):
        asked.require_pools()


def test_a_stock_server(server: Answering, asked: Ollama) -> None:
    server.answer = lambda *_: (200, {"models": [{"name": "a"}]})
    with pytest.raises(NoPoolsError, match="stock build, or it is switched off") as caught:
        asked.look()
    assert "OLLAMA_KVCACHED_ENABLED=true" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("status", "answer", "says"),
    [
        (500, {"error": "it broke"}, "HTTP 500: it broke"),
        (200, b"<html>", "not JSON"),
        (200, {"object": "list"}, "not an Ollama"),
        (200, {"models": [1]}, "not an Ollama"),
        (200, {"models": [{"kvcached": {"kv_mapped": "many"}}]}, "not understood"),
    ],
)
def test_answers_that_are_no_use(
    status: int, answer: Any, says: str, server: Answering, asked: Ollama
) -> None:
    server.answer = lambda *_: (status, answer)
    with pytest.raises(PoolsError, match=says):
        asked.look()


def test_nobody_answers() -> None:
    with pytest.raises(PoolsError, match=r"cannot read http://127\.0\.0\.1:1/api/ps") as caught:
        Ollama("127.0.0.1:1").require_pools()
    assert "ollama serve" in str(caught.value.hint)
