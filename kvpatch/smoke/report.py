"""Checks, their results, and what a failed one leaves to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

from kvpatch.errors import SmokeError
from kvpatch.process import ProcessFailure

Figure = int | float | str
Progress = Callable[[str], None]


class CheckFailed(Exception):
    """What was expected and what was found. `logs` are last lines by the name of the program that wrote
    them."""

    def __init__(
        self,
        detail: str,
        *,
        figures: Mapping[str, Figure] | None = None,
        logs: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.figures = dict(figures or {})
        self.logs = dict(logs or {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One result. `figures` are measured values (bytes unless the name says otherwise); `logs`, of a failed
    check, the last lines of each program that ran in it."""

    name: str
    ok: bool
    seconds: float
    detail: str
    figures: dict[str, Figure] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "name": self.name,
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "detail": self.detail,
            "figures": dict(self.figures),
        }
        if self.logs:
            value["logs"] = dict(self.logs)
        return value

    def lines(self) -> list[str]:
        """The check as text: one line, and for a failed one its figures and logs."""
        mark = "ok" if self.ok else "FAILED"
        text = [f"{mark:6} {self.name} ({self.seconds:.1f} s): {self.detail}"]
        if not self.ok:
            text += [f"       {key} = {value}" for key, value in self.figures.items()]
            for program, tail in self.logs.items():
                text.append(f"       last lines of {program}:")
                text += [f"         {line}" for line in tail.splitlines()]
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class SmokeReport:
    """All checks of one smoke run, in the order they ran."""

    root: str
    kind: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed; a run without checks proves nothing and is not ok."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.ok)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "kvpatch.smoke/1",
            "root": self.root,
            "kind": self.kind,
            "ok": self.ok,
            "seconds": round(sum(check.seconds for check in self.checks), 3),
            "checks": [check.to_json() for check in self.checks],
        }

    def require_ok(self, hint: str) -> None:
        """Raise SmokeError, with every line and the report as data, when a check failed."""
        if self.ok:
            return
        names = ", ".join(check.name for check in self.failed) or "none ran"
        raise SmokeError(
            f"{len(self.failed)} of {len(self.checks)} smoke checks failed: {names}\n"
            + "\n".join(self.lines()),
            hint=hint,
            data={"report": self.to_json()},
        )

    def lines(self) -> list[str]:
        text = [line for check in self.checks for line in check.lines()]
        text.append(f"{len(self.checks) - len(self.failed)} of {len(self.checks)} checks passed")
        return text


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check that passed says."""

    detail: str
    figures: dict[str, Figure] = field(default_factory=dict)


class Recorder:
    """Runs checks one by one and keeps their results. A check is a function that returns an Outcome or raises
    CheckFailed; what programs and the network raise counts as failed too, anything else is a fault of ours
    and passes through."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.checks: list[Check] = []
        self._progress = progress

    def run(self, name: str, check: Callable[[], Outcome]) -> bool:
        if self._progress is not None:
            self._progress(name)
        begin = time.monotonic()
        figures: dict[str, Figure]
        logs: dict[str, str] = {}
        try:
            outcome = check()
        except CheckFailed as failure:
            ok, detail, figures, logs = False, failure.detail, failure.figures, failure.logs
        except (requests.RequestException, ProcessFailure, OSError) as error:
            ok, detail, figures = False, f"{type(error).__name__}: {error}", {}
        else:
            ok, detail, figures = True, outcome.detail, outcome.figures
        self.checks.append(
            Check(
                name=name,
                ok=ok,
                seconds=time.monotonic() - begin,
                detail=detail,
                figures=dict(figures),
                logs=logs,
            )
        )
        return ok
