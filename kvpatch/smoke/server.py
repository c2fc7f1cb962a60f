"""Starting servers on loopback, talking to them with time limits, and making sure that they end.

Every server gets an environment variable of its own (`KVPATCH_SMOKE_MARK`), which its descendants inherit
even when they leave its process group: /proc shows whether any of them outlived it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import requests

from kvpatch import process
from kvpatch.smoke.report import CheckFailed

MARK = "KVPATCH_SMOKE_MARK"
_TAIL_LINES = 25
_PORT_TRIES = 3
_POLL_SECONDS = 0.02
_CONNECT_SECONDS = 2.0
_END_SECONDS = 10.0
_CRASH_SECONDS = 5.0
_IN_USE = ("address already in use", "couldn't bind", "bind: address")
_numbers = itertools.count(1)


class _Child(Protocol):
    """What is used of the process handle."""

    pid: int

    def poll(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSpec:
    """How to start a server. `argv` and `env` are functions of the port; `ready_path` answers 200 once it
    serves."""

    name: str
    argv: Callable[[int], Sequence[str | Path]]
    ready_path: str
    env: Callable[[int], Mapping[str, str]] = field(default=lambda port: {})
    start_seconds: float = 60.0


class ServerDied(CheckFailed):
    """The process ended when it should have answered; `returncode` as in the process handle."""

    def __init__(self, detail: str, *, returncode: int, logs: Mapping[str, str]) -> None:
        super().__init__(detail, logs=logs)
        self.returncode = returncode


class Server:
    """A server that runs. Requests that fail for want of a live process raise CheckFailed with its last
    lines."""

    def __init__(self, *, name: str, child: _Child, port: int, log: Path, mark: str) -> None:
        self.name = name
        self.pid = child.pid
        self.port = port
        self.log = log
        self._child = child
        self._mark = mark
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy set for the user's shell has no business on loopback
        # Servers close connections that were idle for some seconds, maybe just when the next request is sent over one.
        self._session.headers["Connection"] = "close"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def returncode(self) -> int | None:
        """Exit status (negative: ended by that signal), or None while it runs."""
        return self._child.poll()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def logs(self) -> dict[str, str]:
        """Last lines, in the form a failed check takes them."""
        return {self.name: tail(self.log_text())}

    def failed(self, detail: str, **figures: int | float | str) -> CheckFailed:
        """A failure that carries this server's last lines."""
        return CheckFailed(detail, figures=figures, logs=self.logs())

    def request(
        self, method: str, path: str, *, json: Any = None, data: bytes | None = None, timeout: float = 60.0
    ) -> requests.Response:
        """One request, whatever its status. Raises CheckFailed when no answer comes within `timeout` seconds
        or the connection breaks (saying how the process ended, if it did)."""
        try:
            return self._session.request(
                method, self.url + path, json=json, data=data, timeout=(_CONNECT_SECONDS, timeout)
            )
        except requests.Timeout as error:
            raise self.failed(f"{self.name}: no answer to {method} {path} within {timeout:g} s") from error
        except requests.RequestException as error:
            raise self.unanswered(f"{self.name}: {method} {path} got no answer", error) from error

    def answers(self, path: str) -> bool:
        """Whether a GET is answered 200; raises requests' errors when there is no answer."""
        return self._session.get(self.url + path, timeout=(_CONNECT_SECONDS, 5.0)).status_code == 200

    def json(self, method: str, path: str, *, json: Any = None, timeout: float = 60.0) -> dict[str, Any]:
        """A request that must answer 200 with a JSON object."""
        response = self.request(method, path, json=json, timeout=timeout)
        if response.status_code != 200:
            raise self.failed(
                f"{self.name}: {method} {path} answered {response.status_code}: {response.text[:500]}"
            )
        try:
            value = response.json()
        except ValueError as error:
            raise self.failed(
                f"{self.name}: {method} {path} answered no JSON: {response.text[:200]}"
            ) from error
        if not isinstance(value, dict):
            raise self.failed(f"{self.name}: {method} {path} answered {type(value).__name__}, not an object")
        return value

    def descendants(self) -> tuple[int, ...]:
        """Live processes started by this server (directly or not), by their environment mark."""
        return tuple(pid for pid in marked(self._mark) if pid != self.pid)

    def stop(self) -> float:
        """Ask the server to end and return the seconds it took. Raises CheckFailed when it does not end in
        time or leaves a process behind."""
        begin = time.monotonic()
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        while self._child.poll() is None:
            if time.monotonic() - begin > _END_SECONDS:
                raise self.failed(f"{self.name} did not end within {_END_SECONDS:g} s of being asked to")
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - begin
        left: tuple[int, ...] = ()
        while time.monotonic() - begin < _END_SECONDS:
            left = marked(self._mark)
            if not left:
                return seconds
            time.sleep(_POLL_SECONDS)
        raise self.failed(f"{self.name} ended but left processes behind: {', '.join(map(str, left))}")

    def close(self) -> None:
        self._session.close()

    def died(self, detail: str, returncode: int) -> ServerDied:
        return ServerDied(
            f"{detail}: the process {describe_end(returncode)}", returncode=returncode, logs=self.logs()
        )

    def unanswered(self, detail: str, error: Exception) -> CheckFailed:
        """What a broken connection means: the process has ended (and how), or it still runs."""
        # A crashed process closes its connections before its exit status is there (it may dump core first).
        deadline = time.monotonic() + _CRASH_SECONDS
        while (returncode := self._child.poll()) is None:
            if time.monotonic() > deadline:
                return self.failed(f"{detail}, though the process still runs ({type(error).__name__})")
            time.sleep(_POLL_SECONDS)
        return self.died(detail, returncode)


def describe_end(returncode: int) -> str:
    """A process's end in words."""
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-returncode).name}"
        return f"was ended by signal {-returncode}"
    return f"ended with status {returncode}"


@contextlib.contextmanager
def serve(spec: ServerSpec, folder: Path, *, pick_port: Callable[[], int] | None = None) -> Iterator[Server]:
    """Start a server, wait until it answers, give it to the block; at the block's end it is stopped and must
    leave nothing behind. Its log is written in `folder`. Another program may take the chosen port first: then
    another port is tried. Raises CheckFailed, with the last lines, when the server does not come up."""
    pick = pick_port or free_port
    for attempt in range(1, _PORT_TRIES + 1):
        port = pick()
        log = _fresh_log(spec, folder)
        mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        with process.start(
            spec.argv(port), env={**spec.env(port), MARK: mark}, cwd=folder, output=log
        ) as child:
            server = Server(name=spec.name, child=child, port=port, log=log, mark=mark)
            try:
                if (ended := _wait_ready(server, spec)) is not None:
                    clash = any(text in server.log_text().lower() for text in _IN_USE)
                    if clash and attempt < _PORT_TRIES:
                        continue
                    raise server.died(f"{spec.name} never served", ended)
                yield server
                server.stop()
                return
            finally:
                server.close()
                _kill_marked(mark)
    raise AssertionError("the last attempt returns or raises")


def start_and_wait_end(spec: ServerSpec, folder: Path, *, seconds: float) -> tuple[int, str]:
    """Start a server that is expected to refuse to run; its exit status and log. Raises CheckFailed when it
    still runs after `seconds`."""
    log = _fresh_log(spec, folder)
    port = free_port()
    mark = f"{os.getpid()}-{uuid.uuid4().hex}"
    with process.start(spec.argv(port), env={**spec.env(port), MARK: mark}, cwd=folder, output=log) as child:
        server = Server(name=spec.name, child=child, port=port, log=log, mark=mark)
        try:
            deadline = time.monotonic() + seconds
            while child.poll() is None:
                if time.monotonic() > deadline:
                    raise server.failed(
                        f"{spec.name} still runs after {seconds:g} s; it should have refused to start"
                    )
                time.sleep(_POLL_SECONDS)
            return child.returncode, server.log_text()
        finally:
            server.close()
            _kill_marked(mark)


def _fresh_log(spec: ServerSpec, folder: Path) -> Path:
    """The path of the next log. What an earlier run wrote there goes: figures are read from logs."""
    log = folder / f"{next(_numbers):02d}-{spec.name}.log"
    log.unlink(missing_ok=True)
    return log


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(text: str, count: int = _TAIL_LINES) -> str:
    """The last `count` lines."""
    return "\n".join(text.splitlines()[-count:])


def marked(mark: str) -> tuple[int, ...]:
    """Live processes whose environment has this mark (all of a run's marks begin with our process id)."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if any(item.startswith(wanted) for item in (entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    return tuple(sorted(found))


def run_mark() -> str:
    """What the marks of all servers started by this process begin with."""
    return f"{os.getpid()}-"


def _wait_ready(server: Server, spec: ServerSpec) -> int | None:
    """None once the server itself answers 200; its exit status when it has ended instead."""
    deadline = time.monotonic() + spec.start_seconds
    while (returncode := server.returncode()) is None:
        if time.monotonic() > deadline:
            raise server.failed(
                f"{spec.name} does not serve {spec.ready_path} after {spec.start_seconds:g} s"
            )
        with contextlib.suppress(requests.RequestException):
            # Somebody else's server may answer on a port that ours failed to get.
            if listens(server, server.port) and server.answers(spec.ready_path):
                return None
        time.sleep(_POLL_SECONDS)
    return returncode


def listens(server: Server, port: int) -> bool:
    """Whether the server or a descendant holds the listening socket of a loopback port."""
    inodes = _listening_inodes(port)
    for pid in (server.pid, *server.descendants()):
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(link.readlink()) in inodes:
                        return True
    return False


def _listening_inodes(port: int) -> frozenset[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for row in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:  # 0A: TCP_LISTEN
                    found.add(f"socket:[{fields[9]}]")
    return frozenset(found)


def _kill_marked(mark: str) -> None:
    """Kill what is left, and wait until it is gone: a killed process takes a moment."""
    deadline = time.monotonic() + _CRASH_SECONDS
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
