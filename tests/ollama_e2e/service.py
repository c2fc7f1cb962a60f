"""The external service, which sets the limit, is killed and started again while clients ask. The limit stays, and no
request notices."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket as sockets
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kvpatch import process, service
from tests.ollama_e2e import sides, traffic, verdict, watch
from tests.ollama_e2e.setting import Setting
from tests.ollama_e2e.sides import Side
from tests.ollama_e2e.verdict import Evidence

SOCKET = "OLLAMA_KVCACHED_SOCKET"
_UP, _DOWN = "kvcached: connected to the service", "kvcached: no service"
_SECONDS = 25.0
_SOON = 15.0


def check(setting: Setting) -> Evidence:
    """The server has no limit of its own: the one in force is the service's."""
    options = setting.options
    problems: list[str] = []
    # A socket's path may have 107 bytes: that of the run's folder may be longer.
    place = Path(tempfile.mkdtemp(prefix="kv"))
    socket = place / "kvcachedd.sock"
    settings = {key: value for key, value in setting.elastic().items() if key != sides.LIMIT}
    try:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(_daemon(setting, socket, "first"))
            side = stack.enter_context(
                sides.start(
                    options.patched,
                    options.folder,
                    "service",
                    setting.members,
                    {**settings, SOCKET: str(socket)},
                )
            )
            _lines(side, _UP, 1, problems)
            watched = watch.Watch(side, setting.limit)
            with watched.watching() as seen:
                others = threading.Thread(
                    target=lambda: _trouble(setting, side, socket, first, stack, problems)
                )
                others.start()
                done = traffic.play(
                    side,
                    tuple(setting.wanted.answers),
                    setting.rng("service"),
                    seconds=_SECONDS,
                    say=setting.say,
                )
                others.join()
            log = side.server.log_text()
            started = watch.children_logged(log, side.names)
        if socket.exists():
            problems.append("the service that was asked to end has left its socket")
    finally:
        shutil.rmtree(place)
    found = verdict.tally(done.outcomes, setting.wanted.answers)
    counts = watch.events(log)
    problems += verdict.answered(found, setting.wanted.answers)
    problems += verdict.elastic(counts, seen, setting.limit)
    problems += verdict.reloaded(started, seen)
    problems += sides.left_behind(side.instance, frozenset(seen.files))
    return Evidence(
        name="service", problems=tuple(problems), tally=found, events=counts, started=started, seen=seen
    )


def _trouble(
    setting: Setting,
    side: Side,
    socket: Path,
    pid: int,
    stack: contextlib.ExitStack,
    problems: list[str],
) -> None:
    """Some time after the clients began: the service is killed, and later there is one again, on the socket file that
    the killed one left."""
    time.sleep(_SECONDS / 4)
    os.kill(pid, signal.SIGKILL)
    _lines(side, _DOWN, 1, problems)
    stack.enter_context(_daemon(setting, socket, "second"))
    _lines(side, _UP, 2, problems)
    if (told := side.server.log_text().count(_DOWN)) != 1:
        problems.append(f"the log says {told} times that the service is down")


@contextlib.contextmanager
def _daemon(setting: Setting, socket: Path, name: str) -> Iterator[int]:
    """A service of the build that is tested, on the run's ledger."""
    options = setting.options
    argv: list[str | Path] = [
        options.patched.root / service.PLACE,
        *service.Options(socket=socket, limit=f"{setting.limit / 1e9:.9f}GB", devices=("host",)).arguments(),
        *("--ledger", options.folder / "ledger"),
    ]
    log = options.folder / f"service-{name}.log"
    log.unlink(missing_ok=True)
    with process.start(argv, output=log) as child:
        deadline = time.monotonic() + _SOON
        while child.poll() is None and not _answers(socket) and time.monotonic() < deadline:
            time.sleep(0.05)
        if child.poll() is not None:
            raise process.ProcessFailure([str(word) for word in argv], child.returncode, log.read_text(), log)
        yield child.pid


def _answers(socket: Path) -> bool:
    """Whether somebody listens: the file alone may be a dead one's."""
    with contextlib.suppress(OSError), sockets.socket(sockets.AF_UNIX) as probe:
        probe.connect(str(socket))
        return True
    return False


def _lines(side: Side, words: str, count: int, problems: list[str]) -> None:
    """Waits until the log has said it so often."""
    deadline = time.monotonic() + _SOON
    while side.server.log_text().count(words) < count:
        if time.monotonic() > deadline:
            problems.append(f"not within {_SOON:g} s: the log says {words!r}, {count} times")
            return
        time.sleep(0.05)
