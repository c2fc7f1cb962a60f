"""Who may use /kvcached of a llama-server, its gauges, and the server that is switched off."""

from __future__ import annotations

import re

import pytest

from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.server import Server
from tests.integration import llama_server
from tests.integration.llama_pair import ONE, PATCHED, STOCK
from tests.integration.llama_server import GB, ON, Start, ask, call, device, is_sleeping, wait_until, work

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, start = llama_server.files, llama_server.start  # fixtures

COMMANDS = ("trim", "sleep", "wake")


def gauges(server: Server) -> dict[str, float]:
    """Our lines of /metrics, every one of which must have the form of Prometheus."""
    text = call(server, "GET", "/metrics").text
    assert "llamacpp:prompt_tokens_total" in text
    found = {}
    for line in text.splitlines():
        if "kvcached" in line and not re.fullmatch(r"# (HELP|TYPE) llamacpp:kvcached_[a-z_]+ \S.*", line):
            match = re.fullmatch(
                r'(llamacpp:kvcached_[a-z_]+\{device="[^"]+"(?:,kind="[a-z]+")?\}) (\d+)', line
            )
            assert match, line
            found[match[1]] = float(match[2])
    return found


def test_kvcached_is_off_unless_asked_for(start: Start) -> None:
    requests_of = [("GET", "/kvcached"), *(("POST", f"/kvcached/{name}") for name in COMMANDS)]
    with start(PATCHED, "-c", "512", *ONE, env={"OLLAMA_KVCACHED_ENABLED": "1"}) as server:
        for method, path in requests_of:
            answer = call(server, method, path)
            assert answer.status_code == 501
            assert answer.json()["error"]["type"] == "not_supported_error"
            assert "OLLAMA_KVCACHED_HTTP=1" in answer.json()["error"]["message"]
    answers = []
    for side in (PATCHED, STOCK):  # switched off there is no such path
        with start(side, "-c", "512", *ONE, env={"OLLAMA_KVCACHED_HTTP": "1"}) as server:
            answers.append([(a.status_code, a.content) for a in (call(server, *one) for one in requests_of)])
    assert answers[0] == answers[1]
    assert {status for status, _ in answers[0]} == {404}


def test_kvcached_is_behind_the_key_and_not_for_web_pages(start: Start) -> None:
    key = {"Authorization": "Bearer secret"}
    with start(PATCHED, "-c", "512", *ONE, "--api-key", "secret", env=ON) as server:
        for method, path in (("GET", "/kvcached"), *(("POST", f"/kvcached/{name}") for name in COMMANDS)):
            assert call(server, method, path).status_code == 401
            assert call(server, method, path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert (
                call(server, method, path, headers={**key, "origin": "http://127.0.0.1"}).status_code == 403
            )
            assert call(server, method, path, headers=key).status_code == 200


def test_gauges_are_the_figures(start: Start) -> None:
    with start(PATCHED, "-c", "2048", *ONE, env={**ON, "OLLAMA_KVCACHED_MEMORY_GB": "0.5"}) as server:
        ask(server, prompt_ids(300, 1), 8)
        shown, found = device(server), gauges(server)
        for kind, value in shown["mapped_bytes"].items():
            assert found[f'llamacpp:kvcached_mapped_bytes{{device="CPU",kind="{kind}"}}'] == value > 0
        assert found['llamacpp:kvcached_limit_bytes{device="CPU"}'] == GB / 2
        assert len(found) == 3 + sum(
            value is not None and name not in ("device", "mapped_bytes", "last_sleep_ms", "last_wake_ms")
            for name, value in shown.items()
        )


def test_switched_off_the_server_is_stock(start: Start) -> None:
    with start(
        PATCHED, "-c", "2048", *ONE, "--sleep-idle-seconds", "1", env={"OLLAMA_KVCACHED_HTTP": "1"}
    ) as server:
        first = ask(server, prompt_ids(300, 1), 16)
        assert gauges(server) == {}
        wait_until(lambda: is_sleeping(server), 6, every=0.2)
        again = ask(server, prompt_ids(300, 1), 16)
        assert again["tokens"] == first["tokens"]
        assert work(again) == (300, 0), "stock's sleep forgets prompts"
    assert "server is exiting sleeping state" in server.log_text()
