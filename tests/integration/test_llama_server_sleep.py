"""Sleep of an idle llama-server, commands of /kvcached, and what conversations keep meanwhile."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.server import Server
from tests.integration import llama_server
from tests.integration.llama_pair import ONE, PATCHED, STEP, STOCK, completion
from tests.integration.llama_server import (
    ON,
    Start,
    Stream,
    ask,
    call,
    device,
    is_refusal,
    is_sleeping,
    limited,
    mapped,
    measured,
    wait_until,
    work,
)

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, start = llama_server.files, llama_server.start  # fixtures

COMMANDS = ("trim", "sleep", "wake")


def conversation(server: Server, between: Callable[[], None]) -> list[Any]:
    """A long first turn and its follow-up: tokens, and what of the prompts was processed."""
    first = ask(server, prompt_ids(600, 1), 24)
    between()
    follow_up = [*prompt_ids(600, 1), *first["tokens"], *prompt_ids(6, 2)]
    second = ask(server, follow_up, 24)
    return [first["tokens"], second["tokens"], work(second)]


def test_an_idle_server_sleeps_and_its_conversations_go_on(start: Start) -> None:
    """Scraped every second, with a limit of 3 s: reading figures is no use."""
    words = ("-c", "4096", *ONE, "--slots")
    with start(STOCK, *words) as server:
        expected = conversation(server, lambda: None)
    assert expected[2][0] < 10 < expected[2][1]

    with start(PATCHED, *words, "--sleep-idle-seconds", "3", env=ON) as server:

        def sleep() -> None:
            awake = device(server)
            assert min(awake["mapped_bytes"].values()) > 0
            assert not is_sleeping(server)

            def scrape() -> bool:
                assert [call(server, "GET", path).status_code for path in ("/metrics", "/slots")] == [
                    200,
                    200,
                ]
                return is_sleeping(server)

            wait_until(scrape, 7, every=1)
            asleep = device(server)
            assert asleep["mapped_bytes"] == {"kv": 0, "weights": 0, "compute": 0}
            assert asleep["host_bytes"] >= awake["mapped_bytes"]["weights"]
            for _ in range(2):
                assert scrape()
                time.sleep(0.5)
            after = device(server)
            assert (after["sleeps"], after["wakes"]) == (asleep["sleeps"], awake["wakes"])
            assert after["mapped_bytes"] == asleep["mapped_bytes"]

        assert conversation(server, sleep) == expected
        assert not is_sleeping(server)
        assert min(device(server)["mapped_bytes"].values()) > 0
    log = server.log_text()
    assert "entering sleeping state" not in log, "the model was destroyed"
    assert re.search(r"kvcached: asleep after 3000 ms without use", log)


def test_a_slot_saved_asleep_is_the_slot_saved_awake(start: Start, tmp_path: Path) -> None:
    with start(PATCHED, "-c", "4096", *ONE, env=ON) as server:
        ask(server, prompt_ids(700, 3), 16)
        for name in ("awake", "asleep"):
            if name == "asleep":
                server.json("POST", "/kvcached/sleep")
                assert mapped(server) == 0
            server.json("POST", "/slots/0?action=save", json={"filename": name})
        assert mapped(server) > 0, "reading the state did not wake it"
    assert (tmp_path / "asleep").read_bytes() == (tmp_path / "awake").read_bytes()
    assert (tmp_path / "awake").stat().st_size > 700 * STEP // 256


def test_commands(start: Start) -> None:
    prompt = prompt_ids(700, 4)
    with start(PATCHED, "-c", "4096", *ONE, env=ON) as server:
        first = ask(server, prompt, 24)
        before = device(server)
        assert server.json("POST", "/kvcached/trim")["success"] is True
        assert device(server)["idle_bytes"] == 0
        server.json("POST", "/slots/0?action=erase", json={})
        server.json("POST", "/kvcached/trim")
        assert device(server)["mapped_bytes"]["kv"] == 0

        assert ask(server, prompt, 24)["tokens"] == first["tokens"]
        slept = server.json("POST", "/kvcached/sleep")
        assert slept["freed_bytes"] >= before["mapped_bytes"]["weights"]
        assert (mapped(server), is_sleeping(server), server.json("GET", "/kvcached")["asleep"]) == (
            0,
            True,
            True,
        )
        server.json("POST", "/kvcached/wake")
        assert not is_sleeping(server)
        assert device(server)["mapped_bytes"]["weights"] == before["mapped_bytes"]["weights"]
        again = ask(server, prompt, 24)
        assert again["tokens"] == first["tokens"]
        assert work(again) == (1, 699)


def test_commands_between_the_steps_of_a_running_request(start: Start) -> None:
    words = ("-c", "4096", *ONE)
    wanted = completion(prompt_ids(300, 5), 1000, ignore_eos=True)
    with start(STOCK, *words) as server:
        expected = server.json("POST", "/completion", json=wanted)["tokens"]
    with start(PATCHED, *words, env=ON) as server:
        answer: list[requests.Response] = []
        asking = threading.Thread(
            target=lambda: answer.append(call(server, "POST", "/completion", body=wanted))
        )
        asking.start()
        commands = 0
        while asking.is_alive():
            for command in COMMANDS:
                assert call(server, "POST", f"/kvcached/{command}").status_code == 200
                commands += 1
        assert answer[0].json()["tokens"] == expected
        assert commands >= 6
        assert device(server)["sleeps"] >= 2


def test_a_sleeper_that_cannot_wake_refuses_and_keeps_its_prompts(start: Start) -> None:
    """Two servers of one group, whose limit holds one: the other is busy, so nobody's memory can be taken."""
    words = ("-c", "4096", *ONE)
    prompt = prompt_ids(600, 1)
    first, charge = measured(start, words, lambda server: ask(server, prompt, 8)["tokens"])
    env = {**limited(charge + 12 * STEP), "KVCACHED_GROUP": "both"}
    with start(PATCHED, *words, env=env) as sleeper:
        assert ask(sleeper, prompt, 8)["tokens"] == first
        sleeper.json("POST", "/kvcached/sleep")
        with start(PATCHED, *words, env=env) as other:
            stream = Stream(other, completion(prompt_ids(100, 2), 2500, ignore_eos=True))
            wait_until(stream.has_begun, 20, every=0.01)
            refused = call(sleeper, "POST", "/completion", body=completion([*prompt, *first], 8))
            assert not stream.ended, "nothing was in the way"
            assert refused.status_code == 503
            assert is_refusal(refused.json()["error"]), refused.text
            assert is_sleeping(sleeper)
            assert len(stream.wait()) == 2500
        again = ask(sleeper, [*prompt, *first, *prompt_ids(5, 3)], 8)
        assert work(again)[1] == 607
