"""Drafts, draft models and images of a llama-server that has no room for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import requests

from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.server import Server
from tests.integration import llama_server
from tests.integration.llama_pair import ONE, PATCHED, STEP, STOCK, completion
from tests.integration.llama_server import (
    SHARING,
    Start,
    Stream,
    ask,
    call,
    is_refusal,
    limited,
    measured,
    wait_until,
)
from tests.integration.tiny_projector import TOKENS, image

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, projector, start = llama_server.files, llama_server.projector, llama_server.start  # fixtures

# One token that was there before is hint enough: nearly every step has a draft.
SHORT = ("--spec-ngram-simple-size-n", "1", "--spec-ngram-simple-size-m", "6")


def test_drafts_are_given_up_before_a_request_is(start: Start) -> None:
    """Speculation from the text itself, while another request exhausts the limit."""
    words = ("-c", "12288", "-np", "2", "-b", "256", "--no-kv-unified")
    drafts = ("--spec-type", "ngram-simple", *SHORT)
    wanted = completion(prompt_ids(600, 7), 400, id_slot=0, ignore_eos=True)

    def one(server: Server) -> Stream:
        stream = Stream(server, {**wanted, "n_probs": 2})
        stream.wait()
        return stream

    alone, _ = measured(start, words, one)
    _, charge = measured(start, (*words, *drafts), lambda server: Stream(server, wanted).wait())
    with start(PATCHED, *words, *drafts, env=limited(charge + 4 * STEP)) as server:
        stream = Stream(server, wanted)
        wait_until(stream.has_begun, 20, every=0.01)
        refused = call(server, "POST", "/completion", body=completion(prompt_ids(3500, 9), 8, id_slot=1))
        stream.wait()
        assert refused.status_code == 503
        assert "kvcached: drafts are given up" in server.log_text()
        assert stream.error is None
        stream.must_equal(alone)


@pytest.mark.parametrize("slots", SHARING)
def test_a_draft_model_without_room_ends_one_request(start: Start, files: Path, slots: str) -> None:
    """Its cache grows behind the target's, so which of the two meets the limit is a matter of one step."""
    words = ("-c", "12288", "-np", "2", "-b", "256", *SHARING[slots])
    drafts = ("--spec-type", "draft-simple", "-md", str(files / "one.gguf"))
    wanted = completion(prompt_ids(600, 7), 300, id_slot=0, ignore_eos=True, n_probs=2)

    def one(server: Server) -> Stream:
        stream = Stream(server, wanted)
        stream.wait()
        return stream

    alone, _ = measured(start, words, one)
    _, charge = measured(start, (*words, *drafts), one)
    met = set()
    for steps in (2, 3):
        with start(PATCHED, *words, *drafts, env=limited(charge + steps * STEP)) as server:
            stream = Stream(server, wanted)
            wait_until(stream.has_begun, 20, every=0.01)
            refused = call(server, "POST", "/completion", body=completion(prompt_ids(3500, 9), 8, id_slot=1))
            stream.wait()
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "5"
            assert is_refusal(refused.json()["error"])
            assert stream.error is None
            stream.must_equal(alone)
            assert len(ask(server, prompt_ids(40, 3), 8, 1)["tokens"]) == 8
            log = server.log_text()
            met.add("failed to decode draft batch" in log)
            assert len(re.findall(r"kvcached: slot \d ends", log)) == 1
            assert "failed to process speculative batch" not in log
    assert met == {False, True}, "only one of the two contexts has met the limit"


def test_a_draft_model_without_room_takes_prompt_caches_first(start: Start, files: Path) -> None:
    words = ("-c", "12288", "-np", "2", "-b", "256", "--no-kv-unified")
    drafts = ("--spec-type", "draft-simple", "-md", str(files / "one.gguf"))
    wanted = prompt_ids(2000, 2)
    answer, charge = measured(start, (*words, *drafts), lambda server: ask(server, wanted, 8, 1)["tokens"])
    met = set()
    for steps in (1, 2):
        with start(PATCHED, *words, *drafts, env=limited(charge + steps * STEP)) as server:
            ask(server, prompt_ids(1000, 1), 8, 0)
            assert ask(server, wanted, 8, 1)["tokens"] == answer
            log = server.log_text()
            assert "slot 0 gives up 1007 cached tokens" in log
            assert "ends, " not in log
            met.add("failed to decode draft batch" in log)
    assert True in met, "the draft's context has not met the limit"


def look(server: Server, salt: int, slot: int) -> requests.Response:
    """A question about an image."""
    parts = [
        {"type": "text", "text": "ba be"},
        {"type": "image_url", "image_url": {"url": image(salt)}},
        {"type": "text", "text": "bi bo"},
    ]
    wanted = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0, "seed": 1}
    return call(server, "POST", "/v1/chat/completions", body={**wanted, "id_slot": slot})


@pytest.mark.parametrize("drafts", [False, True])
def test_an_image_without_room_is_refused_like_text(
    start: Start, files: Path, projector: tuple[str, ...], drafts: bool
) -> None:
    words: tuple[str, ...] = ("-c", "18432", "-np", "3", "-b", "512", "--no-kv-unified", *projector)
    if drafts:
        words = (*words, "--spec-type", "draft-simple", "-md", str(files / "one.gguf"))

    with start(STOCK, *words) as server:
        expected = [look(server, salt, salt).json()["choices"] for salt in (0, 1)]
    first, charge = measured(start, words, lambda server: look(server, 0, 0).json()["choices"])
    assert first == expected[0]
    with start(PATCHED, *words, env=limited(charge)) as server:
        assert look(server, 0, 0).json()["choices"] == expected[0]
        assert look(server, 1, 1).json()["choices"] == expected[1]
        assert re.search(r"slot 0 gives up \d{4} cached tokens", server.log_text())
        running = Stream(server, completion(prompt_ids(TOKENS // 2, 7), 700, id_slot=0, ignore_eos=True))
        wait_until(running.has_begun, 20, every=0.01)
        # more often than upstream suffers steps without a token
        for _ in range(6):
            refused = look(server, 2, 1)
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "5"
            assert is_refusal(refused.json()["error"]), refused.text
        assert not running.ended, "nothing was in the way"
        assert len(running.wait()) == 700
        assert running.error is None
        assert look(server, 0, 2).json()["choices"] == expected[0]


def test_an_image_that_never_fits_ends_no_server(start: Start, projector: tuple[str, ...]) -> None:
    words = ("-c", "4096", *ONE, "-b", "512", *projector)
    _, charge = measured(start, words, lambda server: look(server, 0, 0))
    with start(PATCHED, *words, env=limited(charge - 3 * STEP)) as server:
        for salt in range(6):
            refused = look(server, salt, 0)
            assert refused.status_code == 503
            assert is_refusal(refused.json()["error"]), refused.text
        assert len(ask(server, prompt_ids(100, 1), 8)["tokens"]) == 8
