"""Smoke tests: does what was built behave? See `run`."""

from __future__ import annotations

import time
from pathlib import Path

from kvpatch.smoke.install import Install
from kvpatch.smoke.llama_checks import check_llama, make_models
from kvpatch.smoke.ollama_checks import check_ollama
from kvpatch.smoke.report import Check, CheckFailed, Outcome, Progress, Recorder, SmokeReport
from kvpatch.smoke.server import marked, run_mark

__all__ = ["Check", "Install", "Progress", "SmokeReport", "run"]


def run(
    install: Install, *, workdir: Path, self_test: bool = False, progress: Progress | None = None
) -> SmokeReport:
    """Run every check that fits the install and report; nothing is raised for a check that fails.

    Models, logs and the servers' own folders go to `workdir`. `progress` is called with a check's name before
    it runs. With `self_test`, the proof that smoke can fail covers more configurations. Needs Linux's /proc.
    """
    folder = workdir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(progress)
    if recorder.run("the elastic cache's library is there", lambda: _library(install)):
        made = make_models(folder / "models")
        check_llama(recorder, install, made, folder, self_test=self_test)
        if install.kind == "ollama":
            check_ollama(recorder, install, made, folder)
    recorder.run("every process ended", _all_ended)
    return SmokeReport(root=str(install.root), kind=install.kind, checks=tuple(recorder.checks))


def _library(install: Install) -> Outcome:
    if not install.patched:
        raise CheckFailed(f"{install.library} is missing: this is a stock build, or an incomplete one")
    return Outcome(str(install.library.relative_to(install.root)), {"bytes": install.library.stat().st_size})


def _all_ended() -> Outcome:
    # What was killed a moment ago may not be reaped yet.
    deadline = time.monotonic() + 5.0
    while left := marked(run_mark()):
        if time.monotonic() > deadline:
            raise CheckFailed(f"processes left behind: {', '.join(map(str, left))}")
        time.sleep(0.05)
    return Outcome("no process left")
