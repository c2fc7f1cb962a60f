"""Running git, through GitPython, so that nothing of the user's or the machine's settings steers it.

No user or system configuration, no attributes or ignore files from the home folder, no hooks, no prompts, no
automatic garbage collection, no replacement objects, and no network unless a command is meant for it: a local
command on a partial clone then fails instead of quietly fetching (and writing) into it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kvpatch.errors import GitError, ToolchainError, access_denied, disk_full, guard
from kvpatch.process import clean_environment

_OLDEST = (2, 31)  # GIT_CONFIG_COUNT, rev-parse --path-format, fetch --stdin
_PROTOCOLS = "https:http:ssh:git:file"
# Reaching a host may need these of the caller's; everything else named GIT_* is dropped.
_NETWORK_VARIABLES = ("GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "GIT_SSH", "GIT_SSH_COMMAND", "GIT_PROXY_COMMAND")
_SETTINGS: Mapping[str, str] = {
    "core.hooksPath": "/dev/null",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.fsmonitor": "false",
    "core.untrackedCache": "false",
    "core.autocrlf": "false",
    "core.quotePath": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "submodule.recurse": "false",
    "advice.detachedHead": "false",
    "protocol.version": "2",
    # A stalled server must not hang a build for ever: under 1000 bytes/s for 30 s counts as dropped.
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "30",
}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "died of signal 25")
_DENIED_WORDS = (
    "Permission denied",
    "Read-only file system",
    "Operation not permitted",
    "insufficient permission",
)


def executable() -> str:
    """Path of the git program. Raises ToolchainError when there is none or it is too old."""
    found = shutil.which("git")
    if found is None:
        raise ToolchainError(
            "git is not on PATH; it is needed to keep and patch source trees",
            hint="install git, for example: apt-get install git",
        )
    return found


def version() -> tuple[int, ...]:
    """git's version as numbers. Raises ToolchainError when git is absent or older than 2.31."""
    executable()
    import git

    numbers = tuple(git.Git().version_info)
    if numbers < _OLDEST:
        raise ToolchainError(
            f"git {'.'.join(map(str, numbers))} is too old: at least {'.'.join(map(str, _OLDEST))} is needed",
            hint="install a newer git",
        )
    return numbers


class Git:
    """git on one repository.

    `work_tree` is also the folder commands run in; `config` adds settings for each command (never written to
    disk, so a URL with credentials may be one of them).
    """

    def __init__(
        self,
        git_dir: Path,
        *,
        work_tree: Path | None = None,
        config: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        network: bool = False,
    ) -> None:
        self.git_dir = git_dir
        self.work_tree = work_tree
        self._env = _environment({**_SETTINGS, **(config or {})}, network=network)
        self._env["GIT_DIR"] = str(git_dir)
        if work_tree is not None:
            self._env["GIT_WORK_TREE"] = str(work_tree)
        self._env.update(env or {})

    def run(self, *args: str, stdin: bytes | None = None, env: Mapping[str, str] | None = None) -> bytes:
        """Standard output of a command that must succeed. Raises GitError, DiskFullError or AccessError."""
        status, stdout, stderr = self.attempt(*args, stdin=stdin, env=env)
        if status != 0:
            raise self.failure(args, status, stderr)
        return stdout

    def text(self, *args: str, stdin: bytes | None = None, env: Mapping[str, str] | None = None) -> str:
        """As `run`, decoded and without the line end."""
        return self.run(*args, stdin=stdin, env=env).decode("utf-8", "surrogateescape").rstrip("\n")

    def attempt(
        self, *args: str, stdin: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, str]:
        """Status, standard output and standard error of a command that may fail."""
        variables = {**self._env, **(env or {})}
        driver, argv = self._command(args, variables)
        with _spooled(stdin) as stream:
            status, stdout, stderr = driver.execute(
                argv,
                istream=stream,
                env=variables,
                with_extended_output=True,
                with_exceptions=False,
                stdout_as_string=False,
                strip_newline_in_stdout=False,
            )
        return int(status), stdout, stderr

    def watched(self, *args: str, on_line: Callable[[str], None], stdin: bytes | None = None) -> None:
        """Run a long command; `on_line` sees each line of its standard error, progress updates included."""
        driver, argv = self._command(args, self._env)
        errors: list[str] = []
        with _spooled(stdin) as stream:
            process: Any = driver.execute(
                argv,
                istream=stream,
                env=self._env,
                as_process=True,
                universal_newlines=True,
                with_stdout=False,
            )
            try:
                for line in process.stderr:
                    errors.append(line)
                    del errors[:-200]
                    on_line(line.rstrip())
                status = process.proc.wait()
            finally:
                _finish(process)
        if status != 0:
            raise self.failure(args, status, "".join(errors))

    def feed(self, *args: str, write: Callable[[IO[bytes]], None]) -> None:
        """Run a command whose standard input `write` produces.

        When `write` raises, the command is ended first.
        """
        driver, argv = self._command(args, self._env)
        reading, writing = os.pipe()
        with os.fdopen(writing, "wb") as sink:
            with os.fdopen(reading, "rb") as source:
                process: Any = driver.execute(
                    argv, istream=source, env=self._env, as_process=True, with_stdout=False
                )
            try:
                # A broken pipe means that the command ended early; its status and messages say why.
                with contextlib.suppress(BrokenPipeError):
                    write(sink)
                    sink.close()
                stderr = process.stderr.read().decode("utf-8", "replace")
                status = process.proc.wait()
            finally:
                _finish(process)
                with contextlib.suppress(BrokenPipeError):
                    sink.close()
        if status != 0:
            raise self.failure(args, status, stderr)

    def failure(self, args: Sequence[str], status: int, stderr: str) -> Exception:
        """The exception for a command that ended with `status`."""
        action = f"run `git {args[0]}`"
        detail = _last_lines(stderr)
        where = self.work_tree or self.git_dir
        if status == -signal.SIGXFSZ or any(word in stderr for word in _FULL_WORDS):
            return disk_full(action, where, detail or "file size limit")
        if any(word in stderr for word in _DENIED_WORDS):
            return access_denied(action, where, detail)
        return GitError(
            f"`git {args[0]}` in {where} ended with status {status}: {detail}", status=status, stderr=stderr
        )

    def _command(self, args: Sequence[str], variables: Mapping[str, str]) -> tuple[Any, list[str]]:
        program = executable()
        import git

        prefix: list[str] = []
        # GitPython starts from the whole environment of this process and can only add to it.
        unwanted = sorted(set(os.environ) - set(clean_environment()) - set(variables))
        if unwanted:
            prefix = ["env", *(f"--unset={name}" for name in unwanted)]
        return git.Git(str(self.work_tree or self.git_dir)), [*prefix, program, *args]


def init_repository(git_dir: Path, *, bare: bool) -> None:
    """An empty repository without hooks, templates or user settings. The folder may not exist yet."""
    git_dir.mkdir(parents=True, exist_ok=True)
    runner = Git(git_dir)
    runner.run("init", "--quiet", "--template=", "--object-format=sha1", *(("--bare",) if bare else ()))


def _environment(config: Mapping[str, str], *, network: bool) -> dict[str, str]:
    env = {
        "LC_ALL": "C.UTF-8",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "/bin/false",
        "GIT_NO_LAZY_FETCH": "1",  # honoured by git >= 2.45; GIT_ALLOW_PROTOCOL does it for older ones
        "GIT_ALLOW_PROTOCOL": _PROTOCOLS if network else "none",
        "GIT_CONFIG_COUNT": str(len(config)),
    }
    for number, (name, value) in enumerate(config.items()):
        env[f"GIT_CONFIG_KEY_{number}"] = name
        env[f"GIT_CONFIG_VALUE_{number}"] = value
    if network:
        env["GIT_SSH_COMMAND"] = "ssh -oBatchMode=yes"
        env.update({name: os.environ[name] for name in _NETWORK_VARIABLES if name in os.environ})
    return env


@contextlib.contextmanager
def _spooled(data: bytes | None) -> Iterator[IO[bytes] | None]:
    # A file, not a pipe: git may write before it has read everything, and nobody would be reading.
    if data is None:
        yield None
        return
    with guard("make a temporary file", Path(tempfile.gettempdir())), tempfile.TemporaryFile() as stream:
        stream.write(data)
        stream.seek(0)
        yield stream


def _finish(process: Any) -> None:
    child = process.proc
    if child is None:
        return
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None and not stream.closed:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    # GitPython's wrapper would otherwise try to end the process again when it is collected.
    process.proc = None


def _last_lines(stderr: str) -> str:
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    return "; ".join(lines[-3:])
