"""The three ways of showing a running build: live rows, plain lines, and CI folds."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_MARKS = {"done": ("✓", "green"), "fresh": ("·", "dim"), "failed": ("✗", "red")}
_DETAIL_SECONDS = 15.0


class LiveRows:
    """A row a stage with elapsed time; finished rows stay, the running one shows what it is at."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._stage = ""
        self._detail = ""
        self._began = 0.0

    def stage_started(self, stage: str) -> None:
        self._stage, self._detail, self._began = stage, "", time.monotonic()
        self._live = Live(
            console=self._console, get_renderable=self._row, refresh_per_second=8, transient=True
        )
        self._live.start()

    def stage_detail(self, stage: str, text: str) -> None:
        self._detail = text

    def stage_finished(self, stage: str, status: str, seconds: float) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        mark, style = _MARKS[status]
        self._console.print(
            Text.assemble((f"{mark} ", style), f"{stage:<10}", (_outcome(status, seconds), style))
        )

    def warning(self, text: str) -> None:
        self._console.print(Text.assemble(("! ", "yellow"), text))

    def _row(self) -> Table:
        row = Table.grid(padding=(0, 1))
        elapsed = f"{time.monotonic() - self._began:.1f} s"
        row.add_row(Text("▸", "cyan"), f"{self._stage:<9}", elapsed, Text(self._detail, "dim", no_wrap=True))
        return row


class PlainLines:
    """A line at start and end of a stage, and now and then what it is at: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0

    def stage_started(self, stage: str) -> None:
        self._last = time.monotonic()
        self._say(f"{stage}: started")

    def stage_detail(self, stage: str, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= _DETAIL_SECONDS:
            self._last = now
            self._say(f"{stage}: {text}")

    def stage_finished(self, stage: str, status: str, seconds: float) -> None:
        self._say(f"{stage}: {_outcome(status, seconds)}")

    def warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


class CiLines(PlainLines):
    """Plain lines inside the folds that GitHub and GitLab draw, warnings as annotations."""

    def __init__(self, console: Console, *, gitlab: bool) -> None:
        super().__init__(console)
        self._gitlab = gitlab

    def stage_started(self, stage: str) -> None:
        if self._gitlab:
            self._mark(f"\x1b[0Ksection_start:{int(time.time())}:kvpatch_{stage}\r\x1b[0Kkvpatch {stage}")
        else:
            self._mark(f"::group::kvpatch {stage}")
        super().stage_started(stage)

    def stage_finished(self, stage: str, status: str, seconds: float) -> None:
        super().stage_finished(stage, status, seconds)
        if status == "fresh":
            return
        if self._gitlab:
            self._mark(f"\x1b[0Ksection_end:{int(time.time())}:kvpatch_{stage}\r\x1b[0K")
        else:
            self._mark("::endgroup::")

    def warning(self, text: str) -> None:
        if self._gitlab:
            super().warning(text)
        else:
            self._mark(annotation("warning", "kvpatch", text))

    def _mark(self, text: str) -> None:
        # Not through Rich, which takes the carriage return out that GitLab looks for.
        self._console.file.write(text + "\n")
        self._console.file.flush()


def annotation(level: str, title: str, text: str) -> str:
    """A workflow command of GitHub's that shows `text` ("error" or "warning") beside the run."""
    for plain, escaped in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(plain, escaped)
    return f"::{level} title={title}::{text}"


def _outcome(status: str, seconds: float) -> str:
    return "nothing to do" if status == "fresh" else f"{status} in {seconds:.1f} s"
