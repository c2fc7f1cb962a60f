"""kvpatch top, sleep, wake, trim and limit on a llama-server that works, and over the socket of a kvcachedd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpatch import smoke
from kvpatch.smoke.models import prompt_ids
from tests.go.test_go_shim import run, with_glue
from tests.integration import llama_server
from tests.integration.conftest import Kvpatch
from tests.integration.llama_pair import ONE, PATCHED
from tests.integration.llama_server import ON, Start, Stream, ask

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, start = llama_server.files, llama_server.start  # fixtures

WORDS = ("-c", "4096", *ONE)
Ask = Callable[..., "dict[str, Any]"]


@pytest.fixture
def pools(kvpatch: Kvpatch, patched: smoke.Install, tmp_path: Path) -> Ask:
    """A command on the test's ledger, with the library of the build."""

    def call(*words: str | Path, code: int = 0) -> dict[str, Any]:
        ledger = tmp_path / "ledger"
        return kvpatch(*words, "--ledger", ledger, "--build", patched.root, code=code)

    return call


def one(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only device and its only pool."""
    (device,) = told["data"]["devices"]
    (pool,) = device["pools"]
    return device, pool


def test_a_server_sleeps_and_wakes_on_command(start: Start, pools: Ask) -> None:
    with start(PATCHED, *WORDS, env=ON) as server:
        expected = ask(server, prompt_ids(600, 1), 24)["tokens"]
        pools("trim")  # so that nothing is given back by itself meanwhile
        device, pool = one(pools("top", "--once"))
        assert (pool["pid"], pool["state"]) == (server.pid, "awake")
        assert 0 < pool["kv_mapped"] < pool["kv_reserved"]
        assert pool["weights_mapped"] > 0
        kinds = sum(pool[f"{kind}_mapped"] for kind in ("kv", "weights", "scratch"))
        assert device["ledger_total"] == pool["claim"] >= kinds
        assert device["driver_used"] > device["ledger_total"]

        (slept,) = pools("sleep", pool["name"])["data"]["outcomes"]
        _, asleep = one(pools("top"))
        assert (asleep["state"], asleep["kv_mapped"], asleep["weights_mapped"]) == ("asleep", 0, 0)
        assert slept["freed"] == pool["claim"]
        assert asleep["kv_reserved"] == pool["kv_reserved"]
        assert asleep["kv_asleep"] + asleep["weights_asleep"] > 0
        # A limit that leaves no room keeps it asleep; without it, it wakes.
        pools("limit", "4KiB")
        (error,) = pools("wake", code=10)["errors"]
        assert error["data"]["outcomes"][0]["error"] == "KVCACHED_E_LIMIT"
        (limit,) = pools("limit", "none")["data"]["limits"]
        assert (limit["limit"], limit["overage"]) == (None, 0)
        pools("wake", f"pid:{server.pid}")
        _, awake = one(pools("top"))
        assert (awake["state"], awake["weights_mapped"]) == ("awake", pool["weights_mapped"])
        pools("trim")
        assert one(pools("top"))[1]["spare"] == 0
        pools("sleep")
        assert ask(server, prompt_ids(600, 1), 24)["tokens"] == expected
    (device,) = pools("top")["data"]["devices"]
    assert (device["pools"], device["ledger_total"]) == ([], 0)


def test_commands_do_not_change_an_answer(start: Start, patched: smoke.Install, tmp_path: Path) -> None:
    """They come while a request runs: what is in use says so, what sleeps between two steps wakes for the next."""
    body = {"prompt": prompt_ids(40, 1), "n_predict": 3000, "temperature": 0, "seed": 1}
    body |= {"ignore_eos": True, "return_tokens": True}
    argv = ["--wait", "0.5", "--ledger", tmp_path / "ledger", "--build", patched.root]
    with start(PATCHED, *WORDS, env=ON) as server:
        expected = Stream(server, body).wait()
        stream = Stream(server, body)
        while not stream.has_begun():
            time.sleep(0.01)
        codes = []
        while not stream.ended:
            command = [sys.executable, "-m", "kvpatch", "sleep", *argv]
            codes.append(subprocess.run(command, capture_output=True, check=False).returncode)
        assert stream.wait() == expected
    assert len(expected) == 3000
    assert set(codes) <= {0, 10}
    assert codes


@pytest.fixture
def service(patched: smoke.Install, tmp_path: Path) -> Iterator[Path]:
    """A kvcachedd over the test's ledger; its socket."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler on PATH")
    program, socket = tmp_path / "kvcachedd", tmp_path / "socket"
    run(go, "build", "-o", str(program), "./cmd/kvcachedd", cwd=with_glue(tmp_path))
    (library,) = {path.parent for path in patched.root.rglob("libkvcached.so")}
    argv = [
        program,
        "--socket",
        socket,
        "--library",
        library,
        "--ledger",
        tmp_path / "ledger",
        "--device",
        "host",
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    with (
        (tmp_path / "kvcachedd.log").open("wb") as log,
        subprocess.Popen(argv, stderr=log, env=environ) as daemon,
    ):
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert daemon.poll() is None, (tmp_path / "kvcachedd.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield socket
        daemon.terminate()
        assert daemon.wait(timeout=20) == 0


def test_the_service_shows_what_the_ledger_shows(
    start: Start, pools: Ask, kvpatch: Kvpatch, service: Path
) -> None:
    with start(PATCHED, *WORDS, env=ON) as server:
        ask(server, prompt_ids(600, 1), 24)
        (limit,) = kvpatch("limit", "1GiB", "--socket", service)["data"]["limits"]
        kvpatch("limit", "2GiB", "--card", "--socket", service)
        by_ledger, by_socket = pools("top")["data"], kvpatch("top", "--socket", service)["data"]
        assert (by_ledger["by"], by_socket["by"]) == ("ledger", "socket")
        for told in (by_ledger, by_socket):
            (device,) = told["devices"]
            assert device["limit"] == 2 << 30
            (pool,) = device["pools"]
            assert (pool["limit"], limit["limit"]) == (1 << 30, 1 << 30)
            for unsteady in ("driver", "driver_used"):
                device.pop(unsteady)
            for unsteady in ("last_use_seconds", "weights_asleep", "kv_asleep"):
                pool.pop(unsteady)
        assert by_ledger["devices"] == by_socket["devices"]
        pools("sleep")
        (device,) = kvpatch("top", "--socket", service)["data"]["devices"]
        assert [pool["state"] for pool in device["pools"]] == ["asleep"]
