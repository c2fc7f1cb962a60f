"""A request that asks for less context than the server has is answered as by a stock server that has so much."""

from __future__ import annotations

from typing import Any

import pytest

from kvpatch.smoke.models import prompt_ids, prompt_text
from kvpatch.smoke.server import Server
from tests.integration import llama_server
from tests.integration.llama_pair import ONE, PATCHED, STOCK, completion
from tests.integration.llama_server import ON, Start, call

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, start = llama_server.files, llama_server.start  # fixtures

LESS, ALL = 512, 4096
ASKS = {"kvcached_n_ctx": LESS}
SHIFT = {"no shift": "--no-context-shift", "shift": "--context-shift"}


def post(server: Server, prompt: list[int], answer: int, **more: Any) -> tuple[int, Any]:
    """Status, and what of the answer does not depend on time."""
    done = call(server, "POST", "/completion", body=completion(prompt, answer, id_slot=0, **more))
    if done.status_code != 200:
        return done.status_code, done.json()
    told = done.json()
    keys = ("tokens", "stop_type", "truncated", "tokens_evaluated", "tokens_predicted")
    return done.status_code, [told[key] for key in keys]


def requests_near_the_end(server: Server, answer: int, **more: Any) -> list[tuple[int, Any]]:
    """Prompts as long as the context, longer and shorter; an answer that does not fit behind its prompt."""
    return [
        *(post(server, prompt_ids(n, 1), 4, **more) for n in (LESS + 90, LESS, LESS - 1, LESS - 2)),
        post(server, prompt_ids(400, 2), answer, n_keep=10, ignore_eos=True, **more),
    ]


@pytest.mark.parametrize(("shift", "answer"), [("no shift", -1), ("no shift", 300), ("shift", 700)])
def test_a_request_with_less_context_is_answered_as_by_a_smaller_server(
    start: Start, shift: str, answer: int
) -> None:
    words = (*ONE, SHIFT[shift])
    with start(STOCK, "-c", str(LESS), *words) as server:
        expected = requests_near_the_end(server, answer)
    statuses = [status for status, _ in expected]
    assert statuses == [400, 400, 200, 200, 200]
    tokens, stop, truncated, _, predicted = expected[-1][1]
    assert len(tokens) == predicted
    assert stop == "limit"
    assert predicted == (700 if shift == "shift" else 112)
    assert truncated

    with start(PATCHED, "-c", str(ALL), *words, env=ON) as server:
        post(
            server, prompt_ids(900, 2), 8
        )  # leaves a cached prompt that is longer, and begins as a later one does
        assert requests_near_the_end(server, answer, **ASKS) == expected


def test_others_have_the_whole_context(start: Start) -> None:
    words = (*ONE, "-c", str(ALL), "--no-context-shift", "--slots")
    with start(PATCHED, *words, env=ON) as server:
        assert post(server, prompt_ids(600, 1), 4, **ASKS)[0] == 400
        assert post(server, prompt_ids(400, 2), -1, ignore_eos=True, **ASKS)[1][1:3] == ["limit", True]
        (slot,) = call(server, "GET", "/slots").json()
        assert slot["n_ctx"] == ALL
        with_all = post(server, prompt_ids(600, 1), 200)
        assert with_all[0] == 200
        assert with_all[1][1:3] == ["limit", False]
        # More than there is, nothing, and nonsense are none.
        for value in (ALL + 1, 0, -3, None):
            assert post(server, prompt_ids(600, 1), 200, kvcached_n_ctx=value) == with_all


def test_it_goes_with_a_chat_and_with_several_answers(start: Start) -> None:
    words = ("-np", "2", "--kv-unified", "--no-context-shift")
    wanted = {"messages": [{"role": "user", "content": prompt_text(600, 1)}], "max_tokens": 4}
    with start(PATCHED, "-c", str(ALL), *words, env=ON) as server:
        status = {
            n: call(server, "POST", "/v1/chat/completions", body={"kvcached_n_ctx": n, **wanted}).status_code
            for n in (LESS, 2 * LESS)
        }
        assert status == {LESS: 400, 2 * LESS: 200}
        both = call(
            server,
            "POST",
            "/completion",
            body=completion(prompt_ids(400, 2), -1, n_cmpl=2, ignore_eos=True, **ASKS),
        ).json()
        assert [one["tokens_predicted"] for one in both] == [112, 112]


def test_off_it_is_ignored(start: Start) -> None:
    with start(PATCHED, "-c", str(ALL), *ONE, env={"OLLAMA_KVCACHED_ENABLED": "0"}) as server:
        assert post(server, prompt_ids(600, 1), 4, **ASKS)[0] == 200
