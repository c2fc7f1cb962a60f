"""What the user sees: progress on standard error, results on standard output, one JSON envelope with --json."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from kvpatch.cli.progress import CiLines, LiveRows, PlainLines, annotation
from kvpatch.errors import KvpatchError
from kvpatch.events import Events

ENVELOPE_SCHEMA = 1
_LOG_COLUMNS = 200
# What a shell reports of a program that SIGPIPE ended.
READER_GONE = 128 + signal.SIGPIPE
# Newer typers carry their own copy of click and older ones import it; both name this base class, neither exports it.
ParseError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def command_name(argv: Sequence[str]) -> str:
    """The command in an argument list, for the envelope: the first word that is no option, of `bench` the next too."""
    words = [word for word in argv if not word.startswith("-")]
    return " ".join(words[: 2 if words[:1] == ["bench"] else 1]) or "kvpatch"


class _Console(Console):
    """A console that ends the command where its reader has gone, as `head` does; rich would say 1, without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _to_nowhere(self.file)
        raise typer.Exit(READER_GONE)


def _to_nowhere(stream: IO[str]) -> None:
    # What is buffered would be written once more at the end of the process, and Python complain.
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class Screen:
    """Both streams and the way of rendering that fits them."""

    def __init__(self, *, json_mode: bool, command: str) -> None:
        self.json_mode = json_mode
        self.command = command
        self._stdout = sys.stdout
        # Without a terminal there is no width to fit: a table cut at 80 columns helps nobody who reads a log.
        # No emoji: ":100:" in a compiler's message is a line number.
        self._out = _Console(highlight=False, soft_wrap=True, emoji=False)
        if not self._out.is_terminal:
            self._out = _Console(highlight=False, soft_wrap=True, emoji=False, width=_LOG_COLUMNS)
        self._err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def events(self) -> Events:
        """A listener for a running build: live rows on a terminal, folds in CI, plain lines elsewhere."""
        if os.environ.get("GITHUB_ACTIONS") == "true" or os.environ.get("GITLAB_CI") == "true":
            return CiLines(self._err, gitlab=os.environ.get("GITLAB_CI") == "true")
        if self._err.is_terminal and not self.json_mode:
            return LiveRows(self._err)
        return PlainLines(self._err)

    def result(self, data: dict[str, Any], *renderables: RenderableType) -> None:
        """The result of a command that succeeded: data for programs, renderables for people."""
        if self.json_mode:
            self._envelope("ok", 0, data, [])
        self.show(*renderables)

    def show(self, *renderables: RenderableType) -> None:
        """Something for people only."""
        if not self.json_mode:
            for renderable in renderables:
                self._out.print(renderable)

    @property
    def is_live(self) -> bool:
        """Whether a picture can be drawn anew in place: people look, and on a terminal."""
        return self._out.is_terminal and not self.json_mode

    @property
    def width(self) -> int:
        return self._out.width

    def live(self, picture: Callable[[], RenderableType], interval: float) -> None:
        """Draw a picture anew each `interval` seconds until the user ends it; the last one stays."""
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(picture(), console=self._out, auto_refresh=False, vertical_overflow="crop") as shown,
        ):
            while True:
                time.sleep(interval)
                shown.update(picture(), refresh=True)

    def note(self, text: str) -> None:
        """A line of progress outside a stage."""
        self._err.print(text, markup=False)

    @contextlib.contextmanager
    def parsing(self) -> Iterator[None]:
        """With --json, what the parser prints by itself (help) becomes an envelope too."""
        if not self.json_mode:
            yield
            return
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            yield
        if printed.getvalue():
            self._envelope("ok", 0, {"text": printed.getvalue()}, [])

    def failure(self, error: KvpatchError) -> int:
        """Render an expected failure; returns its exit code."""
        if self.json_mode:
            entry = {"code": error.code, "message": error.message, "hint": error.hint, "data": error.data}
            self._envelope("error", error.exit_code, {}, [entry])
        self._error_lines(error.message, error.hint)
        return error.exit_code

    def usage_error(self, error: Exception) -> int:
        """Render a command line that does not parse (a ParseError); returns 2."""
        context = getattr(error, "ctx", None)
        message = str(error.format_message())  # type: ignore[attr-defined]
        hint = f"{context.command_path} --help" if context is not None else "kvpatch --help"
        if type(error).__name__ == "NoArgsIsHelpError":
            self._err.print(Text(message))
            message = "no command was given"
        if self.json_mode:
            entry = {"code": "usage", "message": message, "hint": hint, "data": {}}
            self._envelope("error", 2, {}, [entry])
        self._error_lines(message, hint)
        return 2

    def interrupted(self, exit_code: int) -> None:
        """Say that the user ended it, and that going on is possible."""
        if self.json_mode:
            entry: dict[str, Any] = {
                "code": "interrupted",
                "message": "interrupted",
                "hint": None,
                "data": {},
            }
            self._envelope("error", exit_code, {}, [entry])
        self._err.print("interrupted; finished stages are kept, the same command goes on from there")

    def bug(self, error: Exception, crash: Path, exit_code: int) -> int:
        """Render an unexpected exception, for which kvpatch is to blame."""
        message = f"a bug in kvpatch: {type(error).__name__}: {error}"
        hint = f"please report it with {crash}"
        if self.json_mode:
            entry = {"code": "internal", "message": message, "hint": hint, "data": {"crash_log": str(crash)}}
            self._envelope("error", exit_code, {}, [entry])
        self._error_lines(message, hint)
        return exit_code

    def _error_lines(self, message: str, hint: str | None) -> None:
        with contextlib.suppress(typer.Exit):  # nobody reads it: the exit code is the error's all the same
            self._err.print(Text.assemble(("error: ", "bold red"), message))
            if hint:
                self._err.print(Text.assemble(("next: ", "bold"), hint))
        if os.environ.get("GITHUB_ACTIONS") == "true":
            sys.stderr.write(
                annotation("error", f"kvpatch {self.command}", message.partition("\n")[0]) + "\n"
            )

    def _envelope(
        self, status: str, exit_code: int, data: dict[str, Any], errors: list[dict[str, Any]]
    ) -> None:
        envelope = {
            "schema": ENVELOPE_SCHEMA,
            "command": self.command,
            "status": status,
            "exit_code": exit_code,
            "data": data,
            "errors": errors,
        }
        try:
            self._stdout.write(json.dumps(envelope, indent=2, default=str) + "\n")
            self._stdout.flush()
        except BrokenPipeError:
            _to_nowhere(self._stdout)
            if exit_code == 0:
                raise typer.Exit(READER_GONE) from None
