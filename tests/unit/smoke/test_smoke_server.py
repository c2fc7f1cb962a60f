from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpatch.process import ProcessFailure
from kvpatch.smoke import server as server_module
from kvpatch.smoke.report import CheckFailed
from kvpatch.smoke.server import (
    ServerDied,
    ServerSpec,
    describe_end,
    free_port,
    marked,
    run_mark,
    serve,
    start_and_wait_end,
    tail,
)

Fake = Callable[..., ServerSpec]


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    assert marked(run_mark()) == ()


def test_serves_and_ends(fake: Fake, tmp_path: Path) -> None:
    with serve(fake(), tmp_path) as server:
        # No connection is kept: the server might close it just when the next request is sent.
        assert server.json("GET", "/x") == {"path": "/x", "connection": "close"}
        assert server.returncode() is None
        assert marked(run_mark()) == (server.pid,)
    assert server.returncode() == -signal.SIGTERM
    assert "starting in mode good" in server.log_text()
    assert server.log.parent == tmp_path


def test_an_earlier_runs_log_is_not_read(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_numbers", iter([1]))
    (tmp_path / "01-fake.log").write_text("kvcached: mapped = 1 reserved = 2\n", encoding="utf-8")
    with serve(fake(), tmp_path) as server:
        assert "kvcached" not in server.log_text()


def test_a_server_that_refuses_to_start_leaves_its_last_lines(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(ServerDied, match="ended with status 3") as caught, serve(fake("refuse"), tmp_path):
        pass
    assert caught.value.returncode == 3
    assert "no such model: tiny.gguf" in caught.value.logs["fake"]


def test_a_server_that_never_answers_is_given_up(fake: Fake, tmp_path: Path) -> None:
    begin = time.monotonic()
    with (
        pytest.raises(CheckFailed, match=r"does not serve /health after 0\.5 s") as caught,
        serve(fake("never-ready", start_seconds=0.5), tmp_path),
    ):
        pass
    assert time.monotonic() - begin < 10
    assert "never-ready" in caught.value.logs["fake"]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    spec = ServerSpec(name="none", argv=lambda port: [tmp_path / "missing"], ready_path="/")
    with pytest.raises(ProcessFailure, match="could not be started"), serve(spec, tmp_path):
        pass


def test_a_taken_port_is_tried_no_further(fake: Fake, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], free_port()])
        with serve(fake(), tmp_path, pick_port=lambda: next(ports)) as server:
            assert server.port != taken.getsockname()[1]
    assert len(list(tmp_path.glob("*-fake.log"))) == 2


def test_ports_that_stay_taken_fail_with_the_log(fake: Fake, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(ServerDied, match="never served") as caught,
            serve(fake(), tmp_path, pick_port=lambda: taken.getsockname()[1]),
        ):
            pass
    assert "Address already in use" in caught.value.logs["fake"]
    assert len(list(tmp_path.glob("*-fake.log"))) == 3


def test_an_answer_on_the_port_by_another_program_is_not_taken_for_ours(fake: Fake, tmp_path: Path) -> None:
    with (
        serve(fake(), tmp_path) as first,
        pytest.raises(CheckFailed),
        serve(fake("never-ready", start_seconds=0.5), tmp_path, pick_port=lambda: first.port),
    ):
        pass


def test_a_crash_during_a_request_is_named(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(ServerDied, match="SIGSEGV") as caught, serve(fake(), tmp_path) as server:
        server.json("GET", "/die")
    assert caught.value.returncode == -signal.SIGSEGV


def test_an_answer_that_does_not_come(fake: Fake, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckFailed, match=r"no answer to GET /hang within 0\.3 s"),
        serve(fake(), tmp_path) as server,
    ):
        server.request("GET", "/hang", timeout=0.3)


@pytest.mark.parametrize(
    ("path", "text"),
    [("/error", "answered 500"), ("/text", "answered no JSON"), ("/list", "answered list, not an object")],
)
def test_bad_answers(fake: Fake, tmp_path: Path, path: str, text: str) -> None:
    with pytest.raises(CheckFailed, match=text), serve(fake(), tmp_path) as server:
        server.json("GET", path)


def test_a_server_that_does_not_end_is_killed_and_told_of(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_END_SECONDS", 0.5)
    with pytest.raises(CheckFailed, match="did not end"), serve(fake("deaf"), tmp_path):
        pass


def test_a_child_left_behind_is_found_and_killed(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_END_SECONDS", 0.5)
    with pytest.raises(CheckFailed, match="left processes behind"), serve(fake("leaves-child"), tmp_path):
        pass


def test_start_and_wait_end(fake: Fake, tmp_path: Path) -> None:
    status, text = start_and_wait_end(fake("refuse"), tmp_path, seconds=20)
    assert status == 3
    assert "no such model" in text
    with pytest.raises(CheckFailed, match="should have refused"):
        start_and_wait_end(fake("never-ready"), tmp_path, seconds=0.3)


def test_small_things() -> None:
    assert describe_end(-9) == "was ended by SIGKILL"
    assert describe_end(-63) == "was ended by signal 63" or "SIGRTMAX" in describe_end(-63)
    assert describe_end(2) == "ended with status 2"
    assert tail("a\nb\nc", 2) == "b\nc"
    assert os.getpid() not in marked("")
