"""What the library tells its caller while it works. Rendering is the command line's business alone."""

from __future__ import annotations

from typing import Protocol


class Events(Protocol):
    """Receives progress. Calls come from one thread, in order: started, any number of details, finished."""

    def stage_started(self, stage: str) -> None: ...

    def stage_detail(self, stage: str, text: str) -> None: ...

    def stage_finished(self, stage: str, status: str, seconds: float) -> None:
        """`status` is "done", "fresh" (nothing to do) or "failed"."""

    def warning(self, text: str) -> None: ...


class Silent:
    """Drops everything."""

    def stage_started(self, stage: str) -> None:
        del stage

    def stage_detail(self, stage: str, text: str) -> None:
        del stage, text

    def stage_finished(self, stage: str, status: str, seconds: float) -> None:
        del stage, status, seconds

    def warning(self, text: str) -> None:
        del text
