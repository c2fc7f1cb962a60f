"""The request that ends when there is no room, and the others that go on."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.server import Server
from tests.integration import llama_server
from tests.integration.llama_pair import PATCHED, STEP, STOCK, completion
from tests.integration.llama_server import (
    ON,
    SHARING,
    Start,
    Stream,
    ask,
    call,
    device,
    is_refusal,
    limited,
    measured,
    wait_until,
    work,
)

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, start = llama_server.files, llama_server.start  # fixtures


@contextlib.contextmanager
def two_streams(server: Server) -> Iterator[list[Stream]]:
    """Two requests that generate for a while, both past their prompts."""
    streams = [
        Stream(
            server,
            completion(
                prompt_ids(40 + 20 * number, number), 1000, id_slot=number, ignore_eos=True, n_probs=2
            ),
        )
        for number in range(2)
    ]
    wait_until(lambda: min(len(stream.tokens) for stream in streams) > 2, 20, every=0.01)
    yield streams
    for stream in streams:
        stream.wait()


@pytest.mark.parametrize("slots", SHARING)
def test_no_room_ends_one_request_and_no_other(start: Start, slots: str) -> None:
    words = ("-c", "18432", "-np", "3", "-b", "512", *SHARING[slots])

    def both(server: Server) -> list[Stream]:
        with two_streams(server) as streams:
            return streams

    expected, charge = measured(start, words, both)
    assert [len(stream.tokens) for stream in expected] == [1000, 1000]
    with start(PATCHED, *words, env=limited(charge + 3 * STEP)) as server:
        with two_streams(server) as streams:
            third = call(server, "POST", "/completion", body=completion(prompt_ids(5000, 9), 8, id_slot=2))
            assert not any(stream.ended for stream in streams), "nothing ran beside the third request"
        assert third.status_code == 503
        assert third.headers["Retry-After"] == "5"
        assert is_refusal(third.json()["error"]), third.text
        assert [stream.error for stream in streams] == [None, None]
        for stream, alone in zip(streams, expected, strict=True):
            stream.must_equal(alone)
        # the server goes on, in the slot of the ended request too
        assert len(ask(server, prompt_ids(100, 3), 8, 2)["tokens"]) == 8
        assert device(server)["limit_failures"] > 0


@pytest.mark.parametrize("slots", SHARING)
def test_a_streamed_request_without_room_ends_with_an_event(start: Start, slots: str) -> None:
    words = ("-c", "12288", "-np", "3", *SHARING[slots])
    _, charge = measured(start, words, lambda server: ask(server, prompt_ids(200, 1), 8))
    with start(PATCHED, *words, env=limited(charge + 2 * STEP)) as server:
        stream = Stream(server, completion(prompt_ids(100, 2), 1500, id_slot=1, ignore_eos=True))
        assert 300 < len(stream.wait()) < 1500
        assert stream.error is not None
        assert is_refusal(stream.error), stream.error


@pytest.mark.parametrize("slots", SHARING)
def test_answers_to_one_prompt_end_together(start: Start, slots: str) -> None:
    words = ("-c", "12288", "-np", "3", *SHARING[slots])
    _, charge = measured(start, words, lambda server: ask(server, prompt_ids(200, 1), 8))
    with start(PATCHED, *words, env=limited(charge + 3 * STEP)) as server:
        for prompt, answer in ((300, 1500), (3500, 8)):  # while generating, and before the children began
            refused = call(
                server,
                "POST",
                "/completion",
                body=completion(prompt_ids(prompt, 5), answer, n_cmpl=3, ignore_eos=True),
            )
            assert refused.status_code == 503, refused.text
            assert is_refusal(refused.json()["error"])
            wait_until(lambda: not any(s["is_processing"] for s in call(server, "GET", "/slots").json()), 5)
        assert len(ask(server, prompt_ids(200, 1), 8)["tokens"]) == 8


@pytest.mark.parametrize("slots", SHARING)
def test_prompt_caches_of_idle_slots_go_first(start: Start, slots: str) -> None:
    words = ("-c", "12288", "-np", "3", *SHARING[slots])
    kept, wanted = prompt_ids(1000, 1), prompt_ids(2000, 2)
    answer, charge = measured(start, words, lambda server: ask(server, wanted, 8, 1)["tokens"])
    with start(PATCHED, *words, env=limited(charge + STEP)) as server:
        ask(server, kept, 8, 0)
        assert ask(server, wanted, 8, 1)["tokens"] == answer
        assert "slot 0 gives up 1007 cached tokens" in server.log_text()
        assert work(ask(server, prompt_ids(300, 1), 8, 0)) == (300, 0)


def test_a_prompt_that_cannot_be_split_is_ended_not_halved(start: Start) -> None:
    """Its halves would be pooled apart, and the answer would be wrong."""
    words = ("-c", "8192", "-np", "4", "--kv-unified", "--embeddings", "-ub", "2048")

    def embed(server: Server) -> list[Any]:
        answers = [
            call(server, "POST", "/embeddings", body={"input": [prompt_ids(count, 1)]})
            for count in (200, 1500, 100)
        ]
        return [a.json() if a.status_code == 200 else a for a in answers]

    with start(STOCK, *words, model="pooling") as server:
        expected = embed(server)
    with start(PATCHED, *words, model="pooling", env=ON) as server:
        assert embed(server) == expected
        kinds = device(server)["mapped_bytes"]
    limit = kinds["weights"] + kinds["compute"] + kinds["kv"] // 2
    with start(PATCHED, *words, model="pooling", env=limited(limit)) as server:
        short, refused, shorter = embed(server)
    assert (short, shorter) == (expected[0], expected[2])
    assert refused.headers["Retry-After"] == "5"
    assert is_refusal(refused.json()["error"])


class Branches:
    """Two answers to one prompt, one of which ends early, so that its slot is free while the other still shares its
    cells; and a prompt for that slot which needs a checkpoint."""

    PROMPT = prompt_ids(1000, 1)
    OTHER = (*PROMPT[:900], *prompt_ids(50, 3))
    LONG = 200

    def __init__(self, server: Server, stop: str | None = None) -> None:
        self._server = server
        more = {"n_cmpl": 2, "temperature": 1, "ignore_eos": True, "stop": [stop] if stop else []}
        self._body = completion(self.PROMPT, self.LONG, **more)

    def ask(self) -> list[dict[str, Any]]:
        answer = call(self._server, "POST", "/completion", body=self._body)
        assert answer.status_code == 200, answer.text
        value: list[dict[str, Any]] = answer.json()
        return value

    def ask_beside(self, slot: int) -> tuple[requests.Response, list[dict[str, Any]]]:
        """Asks OTHER in the slot that is free first, while the other one generates."""
        answers: list[dict[str, Any]] = []
        both = threading.Thread(target=lambda: answers.extend(self.ask()))
        both.start()

        def free() -> bool:
            busy = [s["id"] for s in call(self._server, "GET", "/slots").json() if s["is_processing"]]
            return len(busy) == 1 and busy != [slot]

        wait_until(free, 20, every=0.005)
        other = call(self._server, "POST", "/completion", body=completion([*self.OTHER], 8, id_slot=slot))
        assert both.is_alive(), "the slot with the shared cells was idle"
        both.join()
        return other, answers


@pytest.mark.parametrize("idle", [True, False])
def test_a_checkpoint_without_room_ends_no_server(start: Start, idle: bool) -> None:
    """In a unified cache what comes back from a checkpoint needs cells anew where another slot shares those that were
    there: from a prompt cache that nobody uses, else the prompt is processed from its start, and refused."""
    words = ("-c", "8192", "-np", "3", "--kv-unified", "-b", "512", "--checkpoint-min-step", "0", "--slots")

    def keep(server: Server) -> None:
        if idle:
            ask(server, prompt_ids(1200, 5), 8, 2)

    with start(PATCHED, *words, model="window", env=ON) as server:
        keep(server)
        first, second = Branches(server).ask()
        stop = " ".join(first["content"].split(" ")[8:12])
        assert stop not in second["content"]
        slot = first["id_slot"]
        other, branches = Branches(server, stop).ask_beside(slot)
        lengths = [branch["tokens_predicted"] for branch in branches]
        assert lengths[0] < Branches.LONG == lengths[1]
        reused = work(other.json())[1]
        assert 0 < reused < 900, "no checkpoint was used"
        kinds = device(server)["mapped_bytes"]
    limit = kinds["weights"] + kinds["compute"] + (10 if idle else 5) * STEP
    with start(PATCHED, *words, model="window", env=limited(limit)) as server:
        keep(server)
        other, branches = Branches(server, stop).ask_beside(slot)
        assert [branch["tokens_predicted"] for branch in branches] == lengths
        log = server.log_text()
        again = f"slot {slot} processes its prompt again, a checkpoint of it cannot be used"
        if idle:
            assert (other.status_code, work(other.json())[1]) == (200, reused), other.text
            assert "slot 2 gives up 1207 cached tokens" in log
            assert again not in log
        else:
            assert again in log
            assert other.status_code == 503
            assert other.headers["Retry-After"] == "5"
            assert is_refusal(other.json()["error"]), other.text
        assert len(ask(server, prompt_ids(100, 3), 8, slot)["tokens"]) == 8


def test_a_refused_prompt_does_not_flood_the_log(start: Start) -> None:
    """Upstream tries it in ever smaller pieces, each of which may find no room."""
    words = ("-c", "12288", "-np", "1")
    _, charge = measured(start, words, lambda server: ask(server, prompt_ids(200, 1), 8))
    with start(PATCHED, *words, env=limited(charge + 2 * STEP)) as server:
        refused = call(server, "POST", "/completion", body=completion(prompt_ids(3000, 5), 8))
        assert is_refusal(refused.json()["error"]), refused.text
        log = server.log_text()
    assert log.count("retrying with smaller batch size") > 8
    assert 1 <= log.count("kvcached: no room for") <= 3
    assert len(re.findall(r"kvcached: slot \d ends", log)) == 1
