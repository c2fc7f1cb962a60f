"""The one place that runs other programs.

Argument vectors, never shell strings; an environment of our own making (no ``GIT_*``, no ``LD_*``: a variable meant
for the caller's shell must not steer a build); output goes to a log file and, on failure, its last lines into the
exception. Each child leads a session of its own, so that Ctrl-C reaches us alone and we can end the whole tree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_DROPPED_PREFIXES = ("GIT_", "LD_", "PYTHON", "OLLAMA_", "KVCACHED_", "LLAMA_", "GGML_", "CMAKE_", "CGO_")
_DROPPED = frozenset(
    {
        "CPATH",
        "CPLUS_INCLUDE_PATH",
        "CPPFLAGS",
        "C_INCLUDE_PATH",
        "DESTDIR",
        "GOARCH",
        "GOEXPERIMENT",
        "GOOS",
        "LDFLAGS",
        "LIBRARY_PATH",
        "MAKEFLAGS",
        "MAKELEVEL",
        "NINJA_STATUS",
    }
)
_KEPT = frozenset({"PYTHONHASHSEED"})
_TAIL_LINES = 25
_GRACE_SECONDS = 5.0


class ProcessFailure(Exception):
    """A program ended with a non-zero status, or could not be started (`returncode` is then None)."""

    def __init__(self, argv: Sequence[str], returncode: int | None, tail: str, log: Path | None) -> None:
        self.argv = tuple(str(word) for word in argv)
        self.returncode = returncode
        self.tail = tail
        self.log = log
        status = "could not be started" if returncode is None else f"ended with status {returncode}"
        super().__init__(f"`{' '.join(self.argv)}` {status}" + (f"\n{tail}" if tail else ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """What a finished program left: its status and, when captured, its standard output as text."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment without variables that would change what a build does, plus `extra`."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k in _KEPT or not (k in _DROPPED or k.startswith(_DROPPED_PREFIXES))
    }
    env["LC_ALL"] = "C.UTF-8"
    env.update(extra or {})
    return env


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    check: bool = True,
    timeout: float | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Run a program to its end.

    `env` is added to `clean_environment()`. With `log`, output (both streams) is appended there, each command
    preceded by a line that repeats it; without, standard output is returned in the result. `on_line` sees each line
    as it comes. Raises ProcessFailure when the program cannot be started, times out, or (with `check`) fails.
    """
    args = [str(a) for a in argv]
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        sink = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            sink = stack.enter_context(log.open("a", encoding="utf-8", errors="replace"))
            sink.write(f"+ {' '.join(args)}\n")
            sink.flush()
        with start(args, cwd=cwd, env=env, merge_stderr=log is not None or on_line is not None) as child:
            expired = threading.Event()
            timer = threading.Timer(timeout or 0.0, _expire, (child, expired))
            # Also when we are interrupted: a timer left behind would keep this process from ending.
            stack.callback(timer.cancel)
            if timeout is not None:
                timer.start()
            errors: list[str] = []
            reader = None
            if child.stderr is not None:
                stderr = child.stderr
                reader = threading.Thread(target=lambda: errors.extend(stderr), daemon=True)
                reader.start()
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line)
                if sink is not None:
                    sink.write(line)
                    sink.flush()
                if on_line is not None:
                    on_line(line.rstrip("\n"))
            returncode = child.wait()
            if reader is not None:
                reader.join()
            timer.cancel()
            if expired.is_set():
                lines.append(f"[no end within {timeout:g} s; ended by kvpatch]\n")
                raise ProcessFailure(args, returncode, _tail(lines), log)
    if check and returncode != 0:
        raise ProcessFailure(args, returncode, _tail(lines + errors), log)
    return Completed(argv=tuple(args), returncode=returncode, stdout="".join(lines))


@contextlib.contextmanager
def start(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    merge_stderr: bool = True,
    output: Path | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Start a program and give the handle to the block; at its end it and all it started are ended.

    With `output`, both streams are appended to that file and the handle has no pipes. Raises ProcessFailure when the
    program cannot be started.
    """
    args = [str(a) for a in argv]
    with contextlib.ExitStack() as stack:
        stdout: int | IO[bytes] = subprocess.PIPE
        stderr: int = subprocess.STDOUT if merge_stderr else subprocess.PIPE
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            stdout = stack.enter_context(output.open("ab"))
            stderr = subprocess.STDOUT
        try:
            child = subprocess.Popen(
                args,
                cwd=cwd,
                env=clean_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise ProcessFailure(args, None, str(error), None) from error
        try:
            yield child
        finally:
            end(child)
            for stream in (child.stdout, child.stderr):
                if stream is not None:
                    stream.close()


def end(child: subprocess.Popen[str], *, grace: float = _GRACE_SECONDS) -> None:
    """End a program and everything it started: SIGTERM, after `grace` seconds SIGKILL. Safe to repeat."""
    try:
        if child.poll() is None:
            _signal_group(child, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=grace)
    finally:
        # Also when a second Ctrl-C cuts the wait short, and when the leader is gone but its descendants are not.
        _kill_session(child.pid)
        child.wait()


def _expire(child: subprocess.Popen[str], expired: threading.Event) -> None:
    expired.set()
    end(child)


def _signal_group(child: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _kill_session(session: int) -> None:
    # Not only the group: ninja gives each of its commands a group of its own, but none leaves the session. A member
    # may start another while we look, hence again until there is none.
    for _ in range(100):
        members = _members(session)
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _members(session: int) -> list[int]:
    """Live processes of a session, by the sixth field of proc(5)'s stat."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX" and int(fields[3]) == session:
                found.append(int(stat.parent.name))
    return found


def _tail(lines: Sequence[str]) -> str:
    return "".join(lines[-_TAIL_LINES:]).rstrip()
