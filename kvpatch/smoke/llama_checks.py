"""What must hold for llama-server: equal answers with the elastic cache off and on, memory that follows use,
refusals that name their reason, and proof that these checks can fail."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kvpatch.smoke import models
from kvpatch.smoke.install import Install
from kvpatch.smoke.llama import (
    OFF,
    ON,
    Answer,
    Ask,
    Config,
    Elastic,
    Session,
    complete,
    first_difference,
    ledger_path,
    log_peak,
    refused,
    run_session,
    sample,
    server_spec,
)
from kvpatch.smoke.memory_checks import (
    memory_at_start,
    memory_falls,
    memory_grows,
    memory_kept,
    memory_rested,
    memory_witnessed,
)
from kvpatch.smoke.report import CheckFailed, Figure, Outcome, Recorder
from kvpatch.smoke.server import ServerDied, describe_end, serve, start_and_wait_end
from kvpatch.smoke.sleep_checks import check_sleep

LEAST_DISTINCT = 32
_SHORT = Ask(prompt=100, answer=96)
_ASKS = (_SHORT, Ask(prompt=1200, answer=64, salt=1), Ask(prompt=3000, answer=64, salt=2))
_SHIFT_CELLS = 512
_SHIFT_ASKS = (Ask(prompt=100, answer=700),)
_CRASHES = frozenset({-signal.SIGSEGV, -signal.SIGBUS})  # what touching a page that is not mapped ends in


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models of one smoke run; `first` and `second` differ in their seed only."""

    first: models.TinyModel
    second: models.TinyModel
    sliding: models.TinyModel


def make_models(folder: Path) -> Models:
    return Models(
        first=models.tiny_llama(folder / "llama-1.gguf", 1),
        second=models.tiny_llama(folder / "llama-2.gguf", 2),
        sliding=models.tiny_swa(folder / "sliding-1.gguf", 1),
    )


def check_llama(recorder: Recorder, install: Install, made: Models, folder: Path, *, self_test: bool) -> None:
    """All checks of a llama-server. With `self_test`, more than one configuration must be seen to fail when
    pages are left out."""
    main = Config(name="llama, -fa on", model=made.first, flash=True)
    plain = Config(name="llama, -fa off", model=made.first, flash=False)
    other = Config(name="llama, second seed", model=made.second, flash=True)
    sliding = Config(name="sliding window, -fa on", model=made.sliding, flash=True)
    sliding_plain = Config(name="sliding window, -fa off", model=made.sliding, flash=False)
    references: dict[str, Session] = {}
    elastic: dict[str, Session] = {}
    for config in (main, plain, other, sliding, sliding_plain):
        asks = _ASKS if config is main else _ASKS[:2]
        _pair(recorder, install, config, asks, folder, references, elastic)
    if main.name in references and other.name in references:
        recorder.run(
            "answers: rich, and different for two seeds",
            lambda: _rich(references[main.name].answers, references[other.name].answers),
        )
    for flash in (True, False):
        config = Config(
            name=f"context shift, -fa {'on' if flash else 'off'}",
            model=made.first,
            flash=flash,
            cells=_SHIFT_CELLS,
            shift=True,
        )
        _pair(recorder, install, config, _SHIFT_ASKS, folder, references, elastic)
    if main.name in elastic:
        recorder.run(
            "limit: refused above it, unharmed below it",
            lambda: _limited(install, elastic[main.name], folder),
        )
    check_sleep(recorder, install, main, folder)
    recorder.run("setting: a bad value is refused", lambda: _bad_value(install, main, folder))
    for config in (plain, sliding_plain) if self_test else (plain,):
        if config.name in references:
            recorder.run(
                f"smoke can fail: {config.name}, one page too few",
                partial(_must_fail, install, config, references[config.name], _ASKS[:2], folder),
            )


def _pair(
    recorder: Recorder,
    install: Install,
    config: Config,
    asks: Sequence[Ask],
    folder: Path,
    references: dict[str, Session],
    elastics: dict[str, Session],
) -> None:
    """One configuration with the cache off and on, and what the two must have shown."""
    found: dict[bool, Session] = {}

    def both() -> Outcome:
        for elastic in (OFF, ON):
            found[elastic.on] = run_session(
                install, config, elastic, asks, folder, erase_then=asks[0], rest=len(asks) > 2
            )
        references[config.name], elastics[config.name] = found[False], found[True]
        return same_answers(found[False], found[True])

    recorder.run(f"tokens equal: {config.name}", both)
    if len(found) < 2:
        return
    on = found[True]
    recorder.run(f"off is stock: {config.name}", lambda: _off_is_stock(found[False], on))
    if config.shift:
        recorder.run(f"context shift ran: {config.name}", lambda: _shifted(found[False], on))
    if config.flash and not config.model.shape.window and not config.shift:
        recorder.run(f"memory at start: {config.name}", lambda: memory_at_start(on))
        recorder.run(f"memory grows with the prompt: {config.name}", lambda: memory_grows(on))
        recorder.run(f"memory kept after a request: {config.name}", lambda: memory_kept(on))
        if len(asks) > 2:
            recorder.run(f"idle memory goes after a while: {config.name}", lambda: memory_rested(on))
    recorder.run(f"memory falls when the slot is erased: {config.name}", lambda: memory_falls(on))
    recorder.run(f"memory as the kernel sees it: {config.name}", lambda: memory_witnessed(on))


def same_answers(reference: Session, tried: Session) -> Outcome:
    """Token ids and the probabilities printed for them and their alternatives must be equal, to the last
    digit. What is asked again after the slot was erased must be answered as it was on the fresh server."""
    compared = 0
    for number, (a, b) in enumerate(zip(reference.answers, tried.answers, strict=True), 1):
        where = first_difference(a.tokens, b.tokens)
        if where is not None:
            raise tried.failed(
                f"answer {number} differs from token {where + 1} on: {_around(a.tokens, where)} off, "
                f"{_around(b.tokens, where)} on"
            )
        if a.alternatives != b.alternatives:
            at = next(
                i
                for i, pair in enumerate(zip(a.alternatives, b.alternatives, strict=True))
                if pair[0] != pair[1]
            )
            raise tried.failed(
                f"answer {number} has equal tokens, but other probabilities from token {at + 1} on: "
                f"{a.alternatives[at]} off, {b.alternatives[at]} on"
            )
        compared += len(a.tokens)
    if tried.answers[0].tokens != tried.answers[-1].tokens:
        raise tried.failed(
            "after erasing the slot, the first prompt is answered otherwise than on the fresh server"
        )
    return Outcome(
        f"{compared} tokens and their probabilities in {len(tried.answers)} answers",
        {"tokens": compared, "answers": len(tried.answers), "distinct": distinct(tried.answers)},
    )


def distinct(answers: Sequence[Answer]) -> int:
    """The fewest distinct tokens that any of the answers has."""
    return min(len(set(a.tokens)) for a in answers)


def _around(tokens: Sequence[int], index: int) -> str:
    return str(list(tokens[max(0, index - 2) : index + 3]))


def _off_is_stock(off: Session, on: Session) -> Outcome:
    if off.elastic_lines or off.samples:
        raise off.failed(
            f"switched off, the server still logs {off.elastic_lines} lines about the elastic cache"
        )
    if not on.samples:
        raise on.failed("switched on, the server logs no address range of an elastic cache")
    return Outcome(
        f"no line about the elastic cache when off, {on.elastic_lines} when on", {"lines": on.elastic_lines}
    )


def _rich(first: Sequence[Answer], second: Sequence[Answer]) -> Outcome:
    figures: dict[str, Figure] = {"distinct, seed 1": distinct(first), "distinct, seed 2": distinct(second)}
    for name, answers in (("first", first), ("second", second)):
        if distinct(answers) < LEAST_DISTINCT:
            raise CheckFailed(
                f"an answer of the {name} model has {distinct(answers)} distinct tokens of {LEAST_DISTINCT}: "
                "equality of such answers would show little",
                figures=figures,
            )
    if first[0].tokens == second[0].tokens:
        raise CheckFailed("two models of different seeds answer alike", figures=figures)
    return Outcome(f"at least {min(distinct(first), distinct(second))} distinct tokens an answer", figures)


def _shifted(off: Session, on: Session) -> Outcome:
    for session in (off, on):
        if not session.shifts or not session.answers[0].truncated:
            raise session.failed(
                f"context shift did not run: {session.shifts} log lines say so, "
                f"truncated is {session.answers[0].truncated}"
            )
    if off.shifts != on.shifts:
        raise on.failed(f"{off.shifts} shifts with the cache off, {on.shifts} on")
    generated = len(on.answers[0].tokens)
    return Outcome(
        f"{on.shifts} shifts in {on.config.cells} cells", {"shifts": on.shifts, "tokens": generated}
    )


def _limited(install: Install, free: Session, folder: Path) -> Outcome:
    """Beside what a server has mapped at its start a quarter of the context may be: a short prompt is
    answered as without a limit, a long one is refused, the server lives on, and what is mapped never exceeds
    the limit."""
    config = free.config
    base = free.sample("start").charged
    limit = base + config.model.cache_bytes(config.cells) // 4
    elastic = Elastic(on=True, limit=f"{limit / 10**9:.9f}")
    with serve(server_spec(install, config, elastic, folder), folder) as server:
        for again in (False, True):
            if complete(server, _SHORT).tokens != free.answers[0].tokens:
                when = "after a refusal" if again else "under a limit"
                raise server.failed(f"a short prompt is answered otherwise {when}")
            if not again:
                status, message, retry = refused(server, _ASKS[2])
            now = sample(server, install, ledger_path(folder), "limited", 0)
            if now is None or now.charged > limit:
                raise server.failed(f"more than the limit of {limit} bytes is charged: {now}")
        peak = log_peak(server.log_text())
        if peak > limit:
            raise server.failed(f"{peak} bytes were mapped, more than the limit of {limit}")
        if not refusal_logged(server.log_text()):
            raise server.failed("the log does not say that the limit was the reason")
        if status != 503 or retry is None or "limit" not in message:
            raise server.failed(
                f"refused with status {status} and Retry-After {retry}, not with 503 and words about the limit: "
                f"{message}"
            )
    return Outcome(
        f"refused with status {status} ({message!r}); at most {peak} of {limit} bytes mapped",
        {"limit": limit, "at start": base, "peak": peak, "status": status},
    )


def refusal_logged(text: str) -> bool:
    """Whether a log says that the limit refused something. Every log of an elastic cache names the limit, so the
    library's error is looked for."""
    return "KVCACHED_E_LIMIT" in text


def _bad_value(install: Install, config: Config, folder: Path) -> Outcome:
    """A switch that is neither on nor off ends the server with a message that names the variable."""
    name = "OLLAMA_KVCACHED_ENABLED"
    spec = server_spec(install, config, ON, folder)
    bad = replace(spec, name="llama-server-bad-value", env=lambda port: {name: "perhaps"})
    status, text = start_and_wait_end(bad, folder, seconds=20.0)
    saying = [line for line in text.splitlines() if name in line]
    if status <= 0 or not saying:
        raise CheckFailed(
            f"with {name}=perhaps it ended with status {status}, {len(saying)} lines name the variable",
            logs={bad.name: "\n".join(text.splitlines()[-25:])},
        )
    return Outcome(f"status {status}: {saying[0].strip()[:160]}", {"status": status})


def _must_fail(
    install: Install, config: Config, reference: Session, asks: Sequence[Ask], folder: Path
) -> Outcome:
    """With one page too few mapped, the same requests must crash the server or change an answer. An end for
    another reason (a refused option, say) proves nothing."""
    try:
        tried = run_session(
            install, config, Elastic(on=True, undercommit=1), asks, folder, erase_then=asks[0]
        )
    except ServerDied as death:
        if death.returncode in _CRASHES:
            return Outcome(
                f"the server {describe_end(death.returncode)}, as it must", {"status": death.returncode}
            )
        raise
    try:
        same_answers(reference, tried)
    except CheckFailed as difference:
        return Outcome(f"noticed, as it must be: {difference.detail}")
    raise tried.failed("a page too few was mapped, and neither a crash nor a changed answer showed it")
