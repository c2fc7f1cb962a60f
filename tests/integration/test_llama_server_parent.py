"""A llama-server on leases ends with the process that leased them, however that ends; any other outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from kvpatch import smoke
from kvpatch.runtime import Ledger, load
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.server import free_port
from tests.integration import llama_server
from tests.integration.llama_pair import ONE, command, completion
from tests.integration.llama_server import ON

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files = llama_server.files  # fixture

# The parent: leases a slot, starts the server on it, says its pid, and does nothing more.
# (The test cannot be it: it would have to end.)
PARENT = """
import json, os, subprocess, sys, time
from kvpatch.runtime import Ledger, load
from pathlib import Path
library, path, log, argv, leases = json.loads(sys.argv[1])
env = dict(os.environ)
ledger = Ledger(Path(path), library=load(Path(library)))
slot = ledger.lease("parent", "server", 1 << 20)
if leases:
    env["KVCACHED_LEASES"] = f"host,{slot},18446744073709551615,{path}"
    env["KVCACHED_GROUP"] = "parent"
with open(log, "wb") as out:
    child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
print(child.pid, flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    parent: subprocess.Popen[str]
    child: int
    url: str
    log: Path
    ledger: Path

    def ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def alive(self) -> bool:
        """Whether the child is there: an orphan's zombie, which nobody may collect here, is not."""
        try:
            state = Path(f"/proc/{self.child}/stat").read_text().rpartition(") ")[2]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return not state.startswith("Z")


def until(what: Callable[[], bool], seconds: float) -> float:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - started


@pytest.fixture
def family(patched: smoke.Install, files: Path, tmp_path: Path) -> Iterator[Callable[[bool], Family]]:
    with contextlib.ExitStack() as stack:

        def begin(leases: bool) -> Family:
            port, log, ledger = free_port(), tmp_path / "server.log", tmp_path / "leases"
            binary = patched.llama_server
            words = (*command(binary, port, tmp_path), "--model", files / "one.gguf", "-c", "8192", *ONE)
            argv = [str(word) for word in words]
            told = json.dumps([str(binary.parent), str(ledger), str(log), argv, leases])
            env = {**os.environ, **ON, "KVCACHED_LEDGER": str(tmp_path / "ledger")}
            parent = subprocess.Popen(
                [sys.executable, "-c", PARENT, told], env=env, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(parent)
            stack.callback(parent.kill)
            assert parent.stdout is not None
            child = int(parent.stdout.readline())

            def end_child() -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

            stack.callback(end_child)
            return Family(parent=parent, child=child, url=f"http://127.0.0.1:{port}", log=log, ledger=ledger)

        yield begin


def answering(family: Family) -> None:
    """Begins an answer that takes far longer than the test; returns when its first tokens are there."""
    body = {**completion(prompt_ids(8, 1), 100_000), "stream": True, "ignore_eos": True}
    answer = requests.post(f"{family.url}/completion", json=body, stream=True, timeout=60)
    lines = answer.iter_lines()
    next(lines)

    def read() -> None:
        with contextlib.suppress(requests.RequestException):
            for _ in lines:
                pass

    threading.Thread(target=read, daemon=True).start()


def asleep(family: Family) -> None:
    assert requests.post(f"{family.url}/kvcached/sleep", json={}, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("prepare", "seconds"),
    [(None, 4), (asleep, 4), (answering, 9)],
    ids=["idle", "asleep", "answering"],
)
def test_a_server_on_leases_ends_with_its_lessor(
    family: Callable[[bool], Family],
    patched: smoke.Install,
    prepare: Callable[[Family], None] | None,
    seconds: float,
) -> None:
    """Killed, so that it can tell nobody; nothing is left in the ledger. The end is an orderly one, unless somebody
    else than the lessor reads an answer: the server would wait for him, but not for long."""
    here = family(True)
    until(here.ready, 60)
    if prepare is not None:
        prepare(here)
    here.parent.send_signal(signal.SIGKILL)
    here.parent.wait()
    until(lambda: not here.alive(), seconds)
    text = here.log.read_text(errors="replace")
    assert f"process {here.parent.pid}, which leased this one's memory, has ended" in text
    with Ledger(here.ledger, library=load(patched.llama_server.parent)) as ledger:
        assert not ledger.slots()


def test_a_server_ends_with_a_lessor_that_ends_while_it_loads(family: Callable[[bool], Family]) -> None:
    """At any moment of the start: before it has its lease, there is none for it."""
    for delay in (0.0, 0.01, 0.03, 0.1, 0.2, 0.4):
        here = family(True)
        time.sleep(delay)
        here.parent.send_signal(signal.SIGKILL)
        here.parent.wait()
        until(lambda here=here: not here.alive(), 15)  # type: ignore[misc]


def test_a_server_without_leases_outlives_its_parent(family: Callable[[bool], Family]) -> None:
    here = family(False)
    until(here.ready, 60)
    here.parent.send_signal(signal.SIGKILL)
    here.parent.wait()
    time.sleep(2)
    assert here.alive()
    assert here.ready()
    os.kill(here.child, signal.SIGTERM)
    until(lambda: not here.alive(), 10)
