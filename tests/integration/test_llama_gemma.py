"""A real small model, Gemma 3 270M on the CPU: answers that make sense, the same from stock and from a server that
sleeps in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpatch.smoke.server import Server
from tests.integration.llama_pair import ONE, PATCHED, STOCK, Pair, Side

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]

# The model is not one that chats: it goes on with what it is given.
QUESTIONS = {
    "The capital of Italy is Rome. The capital of Spain is Madrid. The capital of France is": "Paris",
    "Water is made of hydrogen and": "oxygen",
    "The opposite of hot is": "cold",
}
# Several windows of the model's sliding-window layers (512 cells).
LONG = "Rome is the capital of Italy, and Madrid is the capital of Spain. " * 90


def complete(server: Server, prompt: str, count: int) -> tuple[str, list[int], list[float], int]:
    body = {
        "prompt": prompt,
        "n_predict": count,
        "temperature": 0,
        "seed": 1,
        "cache_prompt": True,
        "return_tokens": True,
        "n_probs": 3,
    }
    value = server.json("POST", "/completion", json=body, timeout=600.0)
    probabilities = value["completion_probabilities"]
    return (
        value["content"],
        value["tokens"],
        [p["logprob"] for p in probabilities],
        value["timings"]["prompt_n"],
    )


def test_gemma_makes_sense_and_sleeps(pair: Pair, gemma: Path) -> None:
    def scenario(side: Side) -> list[Any]:
        answers = [complete(side.server, f"{LONG}The capital of France is", 12)]
        # The whole long prompt again, and a little more: nothing of it is to be processed again after the sleep.
        side.sleep()
        answers.append(
            complete(side.server, f"{LONG}The capital of France is Paris. Berlin is the capital of", 8)
        )
        for question in QUESTIONS:
            side.sleep()
            answers.append(complete(side.server, question, 12))
        return answers

    pair.models["gemma"] = gemma
    words = ("-c", "4096", "-fa", "on", *ONE)
    expected, _ = pair.run(STOCK, words, scenario, model="gemma")
    value, log = pair.run(PATCHED, words, scenario, model="gemma")
    assert value == expected
    assert "kvcached: region base" in log
    assert "Paris" in value[0][0]
    assert "Germany" in value[1][0]
    assert value[1][3] < 20, "the conversation was processed again"
    for answer, wanted in zip(value[2:], QUESTIONS.values(), strict=True):
        assert wanted in answer[0], (wanted, answer[0])
