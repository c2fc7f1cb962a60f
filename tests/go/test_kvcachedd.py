"""kvcachedd as it is shipped: the built binary with the real library, asked by a client of the standard library."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpatch import library, service
from kvpatch.runtime import Ledger

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
CONTEXT = {
    "version": "0.0.0",
    "series": "test-0000000",
    "ollama": {"version": "0.0.0", "commit": "0" * 40},
    "llama_cpp": {"commit": "0" * 40, "pin": "b0"},
}

pytestmark = pytest.mark.timeout(600)


def go() -> Path:
    found = shutil.which("go")
    if found is None:
        pytest.skip("no Go compiler on PATH")
    return Path(found)


def run_go_tests(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [go(), "test", *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_races() -> None:
    """Handler, leases, peers, sockets and client under the race detector."""
    run_go_tests("-race", "./service", cwd=ROOT / "go_shim")
    run_go_tests("-race", "-run", "Client|SameLedger", "./kvcached", cwd=ROOT / "go_shim")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/kvcachedd and lib/ollama/libkvcached.so, as a build of kvpatch has them."""
    out = tmp_path_factory.mktemp("out")
    folder = tmp_path_factory.mktemp("module")
    service.write_module(service.module(ROOT, CONTEXT), folder)
    command = service.build_command(go(), out / service.PLACE, "test-0000000")
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (out / "lib" / "ollama").mkdir(parents=True)
    shutil.copy2(library.find(), out / "lib" / "ollama" / library.LIBRARY)
    return out


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose name is short enough for sockets."""
    folder = Path(f"/tmp/kvcachedd-test-{os.getpid()}")
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket; what was taken on it is held until it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__("kvcached", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))

    def call(self, method: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        self.request(
            "POST",
            f"/kvcached.v1.KVCached/{method}",
            json.dumps(fields),
            {"Content-Type": "application/json"},
        )
        answer = self.getresponse()
        return answer.status, json.loads(answer.read())


class Daemon:
    """A running kvcachedd on a socket and a ledger of its own."""

    def __init__(self, build: Path, place: Path, *arguments: str) -> None:
        self.socket = place / "s"
        self.ledger = place / "ledger"
        self.log = place / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [build / service.PLACE, "--socket", self.socket, "--device", "host", *arguments],
                env=os.environ | {"KVCACHED_LEDGER": str(self.ledger)},
                stderr=log,
            )
        wait_for(lambda: self.process.poll() is not None or self.answers())
        assert self.process.poll() is None, self.log.read_text()

    def answers(self) -> bool:
        try:
            with connected(self.socket) as connection:
                return connection.call("GetStats")[0] == 200
        except OSError:
            return False

    def charge(self) -> int:
        with connected(self.socket) as connection:
            return int(connection.call("GetStats")[1]["devices"][0]["charge"])

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextmanager
def connected(path: Path) -> Iterator[Connection]:
    connection = Connection(path)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def running(build: Path, place: Path, *arguments: str) -> Iterator[Daemon]:
    daemon = Daemon(build, place, *arguments)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.end(signal.SIGKILL)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.02)


def test_budgets_are_leases_in_the_ledger(build: Path, place: Path) -> None:
    with running(build, place, "--limit", "100MiB") as daemon, connected(daemon.socket) as one:
        assert oct(daemon.socket.stat().st_mode & 0o777) == "0o600"
        status, taken = one.call("Allocate", size=60 * MB, model_id="a")
        assert (status, taken["gpu_ptr"], taken["ledger"]) == (200, "0", str(daemon.ledger))
        ledger = Ledger(daemon.ledger)
        (slot,) = ledger.slots()
        assert (slot.slot, slot.name, slot.lease, slot.charge) == (taken["slot"], "a", 60 * MB, 60 * MB)
        assert ledger.get_limit(None).limit == 100 * MB
        status, refused = one.call("Allocate", size=str(41 * MB), model_id="b")
        assert (status, refused["code"], refused["reason"]) == (429, "resource_exhausted", "KVCACHED_E_LIMIT")

        _, stats = one.call("GetStats")
        (device,) = stats["devices"]
        (shown,) = device["slots"]
        assert (device["device"], device["limit"], device["charge"]) == ("host", str(100 * MB), str(60 * MB))
        file = daemon.ledger.stat()
        assert device["ledger_file"] == f"{file.st_dev}:{file.st_ino}"
        assert (shown["name"], shown["held_here"], shown["attached"]) == ("a", True, False)

        status, limit = one.call("SetLimit", bytes=10 * MB)
        assert (status, limit["bytes"], limit["overage"]) == (200, str(10 * MB), str(50 * MB))
        assert ledger.get_limit(None).limit == 10 * MB
        assert one.call("Free", handle=taken["handle"]) == (200, {})
        assert ledger.slots() == ()
        assert daemon.end() == 0
    assert not daemon.socket.exists()


HOLDER = """
import http.client, json, os, socket, sys, time
c = http.client.HTTPConnection("kvcached")
c.sock = socket.socket(socket.AF_UNIX)
c.sock.connect(sys.argv[1])
c.request("POST", "/kvcached.v1.KVCached/Allocate", json.dumps({"size": int(sys.argv[2])}),
          {"Content-Type": "application/json"})
sys.exit(3) if c.getresponse().status != 200 else print("held", flush=True)
time.sleep(600)
"""


def test_kill_9_of_a_holder_and_of_the_service(build: Path, place: Path) -> None:
    with running(build, place, "--limit", "100MiB") as daemon:
        holders = [
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, daemon.socket, str(size * MB)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for size in (30, 40)
        ]
        try:
            for holder in holders:
                assert holder.stdout is not None
                assert holder.stdout.readline() == "held\n"
            assert daemon.charge() == 70 * MB
            holders[0].kill()
            wait_for(lambda: daemon.charge() == 40 * MB)
            # The kernel drops what a killed service held for others; the limit stays for who goes on by the ledger.
            daemon.end(signal.SIGKILL)
            ledger = Ledger(daemon.ledger)
            assert ledger.slots() == ()
            assert ledger.get_limit(None).limit == 100 * MB
            assert daemon.socket.exists()
        finally:
            for holder in holders:
                holder.kill()
                holder.wait()
                assert holder.stdout is not None
                holder.stdout.close()
    # The socket that was left behind is no hindrance.
    with running(build, place) as again:
        assert again.charge() == 0
        second = subprocess.run(
            [build / service.PLACE, "--socket", again.socket], capture_output=True, text=True, check=False
        )
        assert second.returncode == 1
        assert "another kvcachedd serves" in second.stderr


def test_two_servers_share_a_budget(build: Path, place: Path) -> None:
    """Claims stay with those who map: the service sets what they may have together, and nothing else."""
    with running(build, place, "--limit", "100MiB") as daemon:
        first, second = Ledger(daemon.ledger), Ledger(daemon.ledger)
        first.lease("ollama-1", "a", 70 * MB)
        with pytest.raises(Exception, match="limit"):
            second.lease("ollama-2", "b", 40 * MB)
        second.lease("ollama-2", "b", 30 * MB)
        with connected(daemon.socket) as one:
            _, stats = one.call("GetStats")
            slots = stats["devices"][0]["slots"]
            assert sorted((s["group"], s["charge"], s["held_here"]) for s in slots) == [
                ("ollama-1", str(70 * MB), False),
                ("ollama-2", str(30 * MB), False),
            ]
            status, refused = one.call("Allocate", size=MB)
            assert (status, refused["reason"]) == (429, "KVCACHED_E_LIMIT")


def test_stream(build: Path, place: Path) -> None:
    with running(build, place) as daemon, connected(daemon.socket) as watcher:
        watcher.request(
            "POST",
            "/kvcached.v1.KVCached/WatchStats",
            '{"interval_ms": 60000}',
            {"Content-Type": "application/json"},
        )
        answer = watcher.getresponse()
        assert json.loads(answer.readline())["devices"][0]["charge"] == "0"
        began = time.monotonic()
        with connected(daemon.socket) as one:
            one.call("Allocate", size=MB)
            while json.loads(answer.readline())["devices"][0]["charge"] != str(MB):
                pass
        while json.loads(answer.readline())["devices"][0]["charge"] != "0":
            pass
        assert time.monotonic() - began < 20, "the ledger's bell was not heard"


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_socket_activation(build: Path, place: Path) -> None:
    path = place / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen()
        # The client is there before the service: its call waits in the socket.
        with connected(path) as early:
            early.connect()
            process = subprocess.Popen(
                [
                    sys.executable, "-c", ACTIVATE, str(listening.fileno()),
                    build / service.PLACE, "--device", "host", "--ledger", place / "ledger",
                ],
                pass_fds=[listening.fileno()], stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                status, stats = early.call("GetStats")
                assert (status, stats["devices"][0]["ledger"]) == (200, str(place / "ledger"))
            finally:
                process.terminate()
                _, text = process.communicate(timeout=20)
            assert process.returncode == 0, text
            assert "socket_from=LISTEN_FDS" in text
        assert path.exists(), "the socket is the manager's"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--limit", "much"], 2, "is not a size"),
        (["--device", "nonsense"], 1, "neither host"),
        (["--socket", "relative"], 1, "absolute path"),
        (["--group", "no-such-group"], 1, "is no group"),
        (["--library", "/nowhere"], 1, "libkvcached.so not found"),
        (["start"], 2, "options alone"),
    ],
)
def test_errors_of_the_command_line(
    build: Path, place: Path, arguments: list[str], code: int, text: str
) -> None:
    done = subprocess.run(
        [build / service.PLACE, "--socket", place / "s", "--ledger", place / "ledger", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    assert not (place / "s").exists()


def test_version(build: Path) -> None:
    text = subprocess.run(
        [build / service.PLACE, "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert text.strip().endswith("+test-0000000")
