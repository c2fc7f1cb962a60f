"""Scenarios that a stock and a patched server play, and what the tests of the hooks ask of both."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpatch import smoke
from kvpatch.smoke.holdings import Holdings, holdings
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.options import if_known, on_cpu, without_memory_map
from kvpatch.smoke.server import Server, ServerSpec, serve

PATCHED, STOCK = "patched", "stock"
ONE = ("-np", "1")
UNIFIED = ("-np", "4", "--kv-unified")
SPLIT = ("-np", "4", "--no-kv-unified")
SLOTS = {"one": ONE, "unified": UNIFIED, "split": SPLIT}
KIB = 1024
# Bytes of one 256-cell step of the tiny llama model in K and V of all layers, f16.
STEP = 256 * KIB


def command(binary: Path, port: int, home: Path) -> tuple[str | Path, ...]:
    """The words that all servers of these tests have in common."""
    return (
        *(binary, "--host", "127.0.0.1", "--port", str(port), "-t", "1", "-tb", "1", "--cache-ram", "0"),
        *("--offline", "--no-webui", "--log-verbosity", "4", "--slot-save-path", f"{home}/"),
        *(*on_cpu(binary), *without_memory_map(binary)),
    )


def completion(prompt: list[int], answer: int, **more: Any) -> dict[str, Any]:
    """Body of a greedy /completion."""
    wanted = {"n_predict": answer, "temperature": 0, "seed": 1, "cache_prompt": True, "return_tokens": True}
    return {"prompt": prompt, **wanted, **more}


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A server that plays a scenario. `elastic`: it is the patched one."""

    server: Server
    install: smoke.Install
    ledger: Path
    elastic: bool

    def held(self) -> Holdings:
        return holdings(self.install, self.ledger, self.server.pid)

    def do(self, action: str) -> int:
        """Trims, sleeps or wakes (stock: nothing); bytes given back."""
        if not self.elastic:
            return 0
        return int(self.server.json("POST", f"/kvcached/{action}", json={}).get("freed_bytes", 0))

    def sleep(self) -> None:
        """Puts everything to sleep, weights too, and makes sure of it."""
        if self.elastic:
            before = self.held()
            self.do("sleep")
            now = self.held()
            assert (now.kv, now.weights, now.compute) == (0, 0, 0), now
            assert now.asleep >= before.weights > 0, (before, now)

    def ask(self, prompt: int, salt: int, answer: int, slot: int = 0) -> Any:
        """Tokens, log-probabilities and how much of the prompt was processed; or the status of a refusal."""
        body = completion(prompt_ids(prompt, salt), answer, id_slot=slot, n_probs=2)
        response = self.server.request("POST", "/completion", json=body, timeout=300.0)
        if response.status_code != 200:
            return response.status_code
        value = response.json()
        probabilities = value["completion_probabilities"]
        return value["tokens"], [p["logprob"] for p in probabilities], value["timings"]["prompt_n"]

    def branch(self, prompt: int, salt: int, count: int) -> list[list[int]]:
        """Several answers to one prompt: with split slots, the prompt's cells are copied from stream to stream."""
        body = {
            "prompt": prompt_ids(prompt, salt),
            "n_predict": 16,
            "seed": 7,
            "n_cmpl": count,
            "return_tokens": True,
        }
        response = self.server.request("POST", "/completion", json=body, timeout=300.0)
        assert response.status_code == 200, response.text
        return [answer["tokens"] for answer in response.json()]

    def slot(self, number: int, action: str, name: str | None = None) -> None:
        """Erases, saves or restores a slot."""
        body = {"filename": name} if name else {}
        self.server.json("POST", f"/slots/{number}?action={action}", json=body)

    def saved(self, name: str) -> str:
        """Digest of a saved slot's file."""
        return hashlib.sha256((self.ledger.parent / name).read_bytes()).hexdigest()

    def mapped(self) -> int:
        """KV bytes, after the server has become idle, which it does after it has answered."""
        time.sleep(0.3)
        return self.held().kv


Scenario = Callable[[Side], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Runs one scenario on both servers, each in a folder of its own."""

    folder: Path
    models: dict[str, Path]
    installs: dict[str, smoke.Install]
    env: dict[str, str] = field(default_factory=dict)

    def run(
        self, side: str, words: Sequence[str], scenario: Scenario, *, model: str = "llama", **env: str
    ) -> tuple[Any, str]:
        """The scenario's value and the server's log."""
        install = self.installs[side]
        binary = install.llama_server
        on = side == PATCHED
        home = self.folder / side
        home.mkdir(exist_ok=True)
        ledger = home / "ledger"

        def argv(port: int) -> Sequence[str | Path]:
            return (
                *command(binary, port, home),
                *("--model", self.models[model]),
                *if_known(binary, "--no-cache-idle-slots"),
                *words,
            )

        elastic = {"OLLAMA_KVCACHED_ENABLED": "true", "OLLAMA_KVCACHED_HTTP": "1"} if on else {}
        spec = ServerSpec(
            name=side,
            argv=argv,
            ready_path="/health",
            env=lambda port: {"KVCACHED_LEDGER": str(ledger), **elastic, **self.env, **env},
        )
        with serve(spec, home) as server:
            value = scenario(Side(server=server, install=install, ledger=ledger, elastic=on))
            assert server.returncode() is None, server.logs()
        return value, server.log_text()

    def both(
        self, words: Sequence[str], scenario: Scenario, *, model: str = "llama", **env: str
    ) -> tuple[Any, str]:
        """Asserts that both give the same; the value, and the patched server's log."""
        expected, _ = self.run(STOCK, words, scenario, model=model)
        value, log = self.run(PATCHED, words, scenario, model=model, **env)
        assert value == expected
        assert "kvcached: region base" in log
        return value, log

    def equal(self, words: Sequence[str], scenario: Scenario, *, model: str = "llama", **env: str) -> str:
        """Asserts that both give the same; the patched server's log."""
        return self.both(words, scenario, model=model, **env)[1]

    def charged_at_start(self, words: Sequence[str], *, model: str = "llama") -> int:
        """What a patched server counts towards the limit before its first request."""
        charge, _ = self.run(PATCHED, words, lambda side: side.held().charge, model=model)
        return int(charge)
