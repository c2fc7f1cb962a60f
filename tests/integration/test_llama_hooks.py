"""The hooks beyond what smoke covers (one slot): several slots, cache types, save and restore, stream copies, shifts
that need other slots' pages, and limits reached half-way. Stock answers are the reference, log-probabilities included.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvpatch import smoke
from kvpatch.smoke import models as tiny
from kvpatch.smoke.models import prompt_ids, tiny_llama, tiny_swa
from kvpatch.smoke.server import Server, ServerSpec, serve

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]

PATCHED, STOCK = "patched", "stock"
ONE = ("-np", "1")
UNIFIED = ("-np", "4", "--kv-unified", "--no-cache-idle-slots")
SPLIT = ("-np", "4", "--no-kv-unified", "--no-cache-idle-slots")
SLOTS = {"one": ONE, "unified": UNIFIED, "split": SPLIT}
KIB = 1024
# Bytes of one 256-cell step of the tiny llama model in K and V of all layers, f16.
STEP = 256 * KIB


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    # Upstream dereferences NULL when it shifts a quantised K whose head size is no multiple of 64.
    wide = dataclasses.replace(tiny.LLAMA, heads=2, kv_heads=1, head_dim=64)
    return {
        "heads of 64": tiny._write(folder / "wide.gguf", 1, wide).path,
        "llama": tiny_llama(folder / "llama.gguf", 1).path,
        "swa": tiny_swa(folder / "swa.gguf", 1).path,
    }


class Pair:
    """Runs one scenario on both servers."""

    def __init__(self, folder: Path, models: dict[str, Path], servers: dict[str, Path]) -> None:
        self.folder, self.models, self.servers = folder, models, servers

    def run(
        self,
        side: str,
        words: Sequence[str],
        scenario: Callable[[Server], Any],
        *,
        model: str = "llama",
        **env: str,
    ) -> tuple[Any, str]:
        """The scenario's value and the server's log."""
        executable = self.servers[side]
        on = side == PATCHED

        def argv(port: int) -> Sequence[str | Path]:
            return (
                *(executable, "--model", self.models[model], "--host", "127.0.0.1", "--port", str(port)),
                *(
                    "-t",
                    "1",
                    "-tb",
                    "1",
                    "--offline",
                    "--no-webui",
                    "--cache-ram",
                    "0",
                    "--log-verbosity",
                    "4",
                ),
                *("--slot-save-path", f"{self.folder}/", *words),
            )

        spec = ServerSpec(
            name="on" if on else "stock",
            argv=argv,
            ready_path="/health",
            env=lambda port: {
                "KVCACHED_LEDGER": str(self.folder / "ledger"),
                **({"OLLAMA_KVCACHED_ENABLED": "true"} if on else {}),
                **env,
            },
        )
        with serve(spec, self.folder) as server:
            value = scenario(server)
        return value, server.log_text()

    def equal(self, words: Sequence[str], scenario: Callable[[Server], Any], *, model: str = "llama") -> str:
        """Asserts that both give the same; the patched server's log."""
        expected, _ = self.run(STOCK, words, scenario, model=model)
        value, log = self.run(PATCHED, words, scenario, model=model)
        assert value == expected
        assert "kvcached: region base" in log
        return log


@pytest.fixture
def pair(tmp_path: Path, models: dict[str, Path], stock: smoke.Install, patched: smoke.Install) -> Pair:
    return Pair(tmp_path, models, {STOCK: stock.llama_server, PATCHED: patched.llama_server})


def ask(server: Server, prompt: int, salt: int, answer: int, slot: int = 0) -> Any:
    """Tokens and log-probabilities, or the status of a refusal."""
    body = {
        "prompt": prompt_ids(prompt, salt),
        "n_predict": answer,
        "temperature": 0,
        "seed": 1,
        "id_slot": slot,
        "cache_prompt": True,
        "return_tokens": True,
        "n_probs": 2,
    }
    response = server.request("POST", "/completion", json=body, timeout=300.0)
    if response.status_code != 200:
        return response.status_code
    value = response.json()
    return value["tokens"], [p["logprob"] for p in value["completion_probabilities"]]


def branch(server: Server, prompt: int, salt: int, count: int) -> list[list[int]]:
    """Several answers to one prompt: with split slots, the prompt's cells are copied from stream to stream."""
    body = {
        "prompt": prompt_ids(prompt, salt),
        "n_predict": 16,
        "seed": 7,
        "n_cmpl": count,
        "return_tokens": True,
    }
    response = server.request("POST", "/completion", json=body, timeout=300.0)
    assert response.status_code == 200, response.text
    return [answer["tokens"] for answer in response.json()]


def slot(server: Server, number: int, action: str, name: str | None = None) -> None:
    server.json("POST", f"/slots/{number}?action={action}", json={"filename": name} if name else {})


def mapped(server: Server) -> int:
    time.sleep(0.3)  # the server answers before it has become idle
    return int(re.findall(r"kvcached: mapped = (\d+)", server.log_text())[-1])


def grow_shrink_restore(slots: str) -> Callable[[Server], Any]:
    def scenario(server: Server) -> Any:
        answers = [ask(server, 20, 1, 16), ask(server, 300, 2, 24), ask(server, 900, 3, 24)]
        answers += [ask(server, 930, 3, 24), ask(server, 40, 4, 16)]
        last = 0
        if slots != "one":
            answers += [ask(server, 500, 6, 16, 1), ask(server, 100, 7, 16, 3), ask(server, 600, 8, 16, 2)]
            last = 1
        answers.append(ask(server, 700, 5, 24, last))
        slot(server, last, "save", "kept")
        slot(server, last, "erase")
        slot(server, 0, "restore", "kept")
        answers.append(ask(server, 730, 5, 24, 0))
        return answers

    return scenario


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("model", "flash", "kind"),
    [
        ("llama", "on", "f16"),
        ("llama", "off", "f16"),
        ("llama", "on", "q8_0"),
        ("llama", "on", "q4_0"),
        ("swa", "on", "f16"),
        ("swa", "off", "f16"),
    ],
)
def test_answers_equal_stock(pair: Pair, model: str, flash: str, kind: str, slots: str) -> None:
    words = (
        "-c",
        "8192" if slots == "split" else "4096",
        "-fa",
        flash,
        "-ctk",
        kind,
        "-ctv",
        kind,
        *SLOTS[slots],
    )
    pair.equal(words, grow_shrink_restore(slots), model=model)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(("flash", "kind"), [("on", "f16"), ("off", "f16"), ("on", "q8_0")])
def test_context_shift_and_stream_copies(pair: Pair, flash: str, kind: str, slots: str) -> None:
    def scenario(server: Server) -> Any:
        answers = [ask(server, 300, 1, 400)]
        if slots == "split":
            answers += [ask(server, 100, 2, 20, 2), ask(server, 400, 3, 200, 1), ask(server, 105, 2, 20, 2)]
            answers += [branch(server, 200, 5, 3), branch(server, 40, 6, 2)]
        return [*answers, ask(server, 50, 4, 40)]

    words = (
        "-c",
        "2048" if slots == "split" else "512",
        "-fa",
        flash,
        "-ctk",
        kind,
        "-ctv",
        kind,
        "--context-shift",
    )
    log = pair.equal((*words, *SLOTS[slots]), scenario, model="heads of 64" if kind == "q8_0" else "llama")
    assert log.count("slot context shift") >= 1


def test_a_prompt_beyond_the_limit_is_refused_and_leaves_nothing(pair: Pair) -> None:
    words = ("-c", "4096", "-fa", "on", "-b", "512", *ONE)
    figures: list[int] = []

    def scenario(server: Server) -> Any:
        first = ask(server, 300, 1, 24)
        too_much = ask(server, 1500, 9, 1)
        if "kvcached" in server.log_text():
            figures.append(mapped(server))
        return first, too_much, ask(server, 400, 2, 24), ask(server, 300, 1, 24)

    (first, _, second, third), _ = pair.run(STOCK, words, scenario)
    value, log = pair.run(PATCHED, words, scenario, KVCACHED_LIMIT=str(4 * STEP))
    assert value == (first, 500, second, third)
    assert figures == [0]
    assert "KVCACHED_E_LIMIT" in log


@pytest.mark.parametrize(("flash", "steps"), [("on", 3.5), ("off", 4.3)])
def test_a_shift_without_room_is_refused_not_skipped(pair: Pair, flash: str, steps: float) -> None:
    """K of four slots has to be mapped for it. Later answers are right: the pending shift does not outlive the slot."""
    words = ("-c", "2048", "-fa", flash, "--context-shift", *SPLIT)

    def scenario(server: Server) -> Any:
        answers = [ask(server, 100, 1, 20), ask(server, 300, 2, 100, 1)]
        slot(server, 1, "erase")
        return [*answers, ask(server, 300, 3, 400), ask(server, 100, 1, 20), ask(server, 300, 2, 100, 1)]

    expected, _ = pair.run(STOCK, words, scenario)
    value, log = pair.run(PATCHED, words, scenario, KVCACHED_LIMIT=str(int(steps * STEP)))
    assert value[2] == 500
    assert [*value[:2], *value[3:]] == [*expected[:2], *expected[3:]]
    assert "failed to prepare memory update" in log


def test_an_erased_slot_gives_its_pages_back_beside_others(pair: Pair) -> None:
    def scenario(server: Server) -> list[int]:
        ask(server, 200, 1, 8, 0)
        ask(server, 900, 2, 8, 1)
        both = mapped(server)
        slot(server, 1, "erase")
        one = mapped(server)
        slot(server, 0, "erase")
        return [both, one, mapped(server)]

    (both, one, none), _ = pair.run(PATCHED, ("-c", "8192", "-fa", "on", *SPLIT), scenario)
    assert (both, one, none) == (5 * STEP, STEP, 0)
