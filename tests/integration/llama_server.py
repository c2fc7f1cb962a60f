"""A llama-server for the tests of its own hooks (test_llama_server_*.py): how one is started, asked and read.

Answers of the stock server are the reference for everything that must not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from kvpatch import smoke
from kvpatch.smoke.models import SLIDING, tiny_embedding, tiny_llama, write
from kvpatch.smoke.server import Server, ServerSpec, serve
from tests.integration.llama_pair import PATCHED, STOCK, command, completion
from tests.integration.tiny_projector import tiny_projector

ON = {"OLLAMA_KVCACHED_ENABLED": "1", "OLLAMA_KVCACHED_HTTP": "1"}
SHARING = {"unified": ("--kv-unified",), "split": ("--no-kv-unified",)}
ENDED = "This request was ended for want of memory: "
GB = 10.0**9
# What other requests are in the batch, and where cells lie, changes the order in which the CPU adds up: the stock
# server's log-probabilities move by up to 0.014 from run to run, and with them tokens that were nearly as likely.
TIE = 0.05
EMBD = 128
WINDOW = 1024

Start = Callable[..., "contextlib.AbstractContextManager[Server]"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one server; a router takes all of the folder's."""
    folder = tmp_path_factory.mktemp("files")
    one = tiny_llama(folder / "one.gguf", 1)
    tiny_llama(folder / "two.gguf", 2)
    tiny_embedding(folder / "pooling.gguf", 3)
    write(folder / "window.gguf", 4, dataclasses.replace(SLIDING, window=WINDOW))
    assert one.shape.embd == EMBD
    return folder


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = (
        tmp_path_factory.mktemp("projector") / "projector.gguf"
    )  # in a folder of its own, because of the router
    tiny_projector(path, EMBD)
    return ("--mmproj", str(path), "--no-mmproj-offload")


@pytest.fixture
def start(tmp_path: Path, files: Path, stock: smoke.Install, patched: smoke.Install) -> Start:
    """Starts a server: a side, command line words, and variables; model "" is a router over the folder of models."""
    executables = {STOCK: stock.llama_server, PATCHED: patched.llama_server}

    def run(
        side: str, *words: str, model: str = "one", env: Mapping[str, str] | None = None
    ) -> contextlib.AbstractContextManager[Server]:
        source = ("--model", files / f"{model}.gguf") if model else ("--models-dir", files)

        def argv(port: int) -> tuple[str | Path, ...]:
            return (*command(executables[side], port, tmp_path), *source, "--metrics", *words)

        variables = {"KVCACHED_LEDGER": str(tmp_path / "ledger"), **(env or {})}
        return serve(
            ServerSpec(name=side, argv=argv, ready_path="/health", env=lambda port: variables), tmp_path
        )

    return run


def call(
    server: Server, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: Any = None
) -> requests.Response:
    """A request with headers of its own, from any thread."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, server.url + path, headers=headers, json=body, timeout=60)


def ask(server: Server, prompt: list[int], answer: int, slot: int = 0) -> dict[str, Any]:
    return server.json("POST", "/completion", json=completion(prompt, answer, id_slot=slot), timeout=120)


def work(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Prompt tokens that were processed, and those that were in the cache."""
    return answer["timings"]["prompt_n"], answer["timings"]["cache_n"]


def device(server: Server) -> dict[str, Any]:
    (found,) = server.json("GET", "/kvcached")["devices"]
    assert isinstance(found, dict)
    return found


def mapped(server: Server) -> int:
    return sum(device(server)["mapped_bytes"].values())


def is_sleeping(server: Server) -> bool:
    value = server.json("GET", "/props")["is_sleeping"]
    assert isinstance(value, bool)
    return value


def wait_until(true: Callable[[], bool], seconds: float, *, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(every)


class Stream:
    """A request whose answer is read as it comes."""

    def __init__(self, server: Server, wanted: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.likely: list[list[tuple[int, float]]] = []
        self.error: dict[str, Any] | None = None
        self.ended = False
        self._server, self._wanted = server, {**wanted, "stream": True}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            with session.post(
                self._server.url + "/completion", json=self._wanted, stream=True, timeout=120
            ) as answer:
                for line in answer.iter_lines():
                    if line.startswith(b"data: {"):
                        event = json.loads(line[len(b"data: ") :])
                        self.error = event.get("error", self.error)
                        self.ended = self.ended or bool(event.get("stop"))
                        self.tokens += event.get("tokens", [])
                        for token in () if self.ended else event.get("completion_probabilities", []):
                            self.likely.append([(t["id"], t["logprob"]) for t in token["top_logprobs"]])

    def has_begun(self) -> bool:
        return len(self.tokens) > 2

    def must_equal(self, other: Stream) -> None:
        """Up to where two tokens were nearly as likely, if anywhere: from there on they are different texts."""
        assert len(self.tokens) == len(other.tokens) == len(other.likely)
        for mine, theirs, likely in zip(self.tokens, other.tokens, other.likely, strict=True):
            if mine != theirs:
                (_, best), (second, near) = likely
                assert mine == second
                assert best - near < TIE
                return

    def wait(self) -> list[int]:
        self._thread.join()
        return self.tokens


def measured(start: Start, words: tuple[str, ...], use: Callable[[Server], Any]) -> tuple[Any, int]:
    """What `use` gives without a limit, and the most that was mapped meanwhile."""
    with start(PATCHED, *words, env=ON) as server:
        value = use(server)
        return value, device(server)["charge_bytes"]


def limited(bytes_: int) -> dict[str, str]:
    return {**ON, "OLLAMA_KVCACHED_MEMORY_GB": f"{bytes_ / GB:.9f}"}


def is_refusal(error: Mapping[str, Any]) -> bool:
    return (
        (error["code"], error["type"]) == (503, "unavailable_error")
        and error["message"].startswith(ENDED)
        and "limit" in error["message"][len(ENDED) :]
        and error["message"].count("; raise OLLAMA_KVCACHED_MEMORY_GB") == 1
    )
