"""llama-server's router mode: sleepers are not counted, and /kvcached is the model's own."""

from __future__ import annotations

import pytest
import requests

from kvpatch.smoke.server import Server
from tests.integration import llama_server
from tests.integration.llama_pair import ONE, PATCHED
from tests.integration.llama_server import ON, Start, call, wait_until

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, start = llama_server.files, llama_server.start  # fixtures


def status_of(router: Server, model: str) -> str:
    (found,) = (m for m in router.json("GET", "/models")["data"] if m["id"] == model)
    value = found["status"]["value"]
    assert isinstance(value, str)
    return value


def test_a_router_does_not_count_sleepers(start: Start) -> None:
    words = ("--models-max", "1", "--sleep-idle-seconds", "1", "-c", "1024", *ONE)
    wanted = {
        "messages": [{"role": "user", "content": "ba be bi"}],
        "max_tokens": 8,
        "temperature": 0,
        "seed": 1,
    }

    def chat(router: Server, model: str) -> str:
        answer = router.json("POST", "/v1/chat/completions", json={**wanted, "model": model}, timeout=90)
        text = answer["choices"][0]["message"]["content"]
        assert isinstance(text, str)
        assert text
        return text

    with start(PATCHED, *words, model="", env=ON) as router:
        first = chat(router, "one")
        wait_until(lambda: status_of(router, "one") == "sleeping", 8, every=0.2)
        (figures,) = router.json("GET", "/kvcached?model=one")["devices"]
        assert sum(figures["mapped_bytes"].values()) == 0
        assert status_of(router, "one") == "sleeping"
        other = chat(router, "two")
        assert status_of(router, "one") == "sleeping", "the sleeper had to go for the second model"
        assert chat(router, "one") == first
        assert status_of(router, "one") in ("loaded", "sleeping")
        assert chat(router, "two") == other
        answer = router.json("POST", "/kvcached/sleep", json={"model": "two"})
        assert answer["success"] is True
        assert call(router, "GET", "/kvcached?model=one", headers={"Origin": "http://x"}).status_code == 403


def test_a_child_that_sleeps_ends_well(start: Start) -> None:
    """Its memory goes last, when who told the router has gone."""
    words = ("--models-max", "1", "--sleep-idle-seconds", "1", "-c", "1024", *ONE)
    wanted = {"model": "one", "messages": [{"role": "user", "content": "ba"}], "max_tokens": 4}
    with start(PATCHED, *words, model="", env=ON) as router:
        for _ in range(3):
            router.json("POST", "/v1/chat/completions", json=wanted, timeout=90)
            wait_until(lambda: status_of(router, "one") == "sleeping", 8)
            before = len(router.log_text())
            router.json("POST", "/models/unload", json={"model": "one"})
            wait_until(lambda: status_of(router, "one") == "unloaded", 8)
            assert "instance name=one exited with status 0" in router.log_text()[before:]


def test_a_router_wants_to_know_which_model(start: Start) -> None:
    with start(PATCHED, "-c", "1024", *ONE, model="", env=ON) as router:
        asked = [call(router, "GET", "/kvcached")]
        for command in ("trim", "sleep", "wake"):
            url = f"{router.url}/kvcached/{command}"
            asked += [
                requests.post(url, data=data, timeout=60) for data in (None, "", "model", '{"model":', "{}")
            ]
        for answer in asked:
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), answer.text
            assert error["message"].startswith("model name is missing from the request"), answer.text
        refused = requests.post(f"{router.url}/kvcached/trim", headers={"Origin": "http://x"}, timeout=60)
        assert refused.status_code == 403
