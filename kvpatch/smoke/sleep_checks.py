"""What must hold for a server that sleeps: everything it had is given back, and nothing is lost by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvpatch.smoke.holdings import Holdings, holdings
from kvpatch.smoke.install import Install
from kvpatch.smoke.llama import (
    OFF,
    ON,
    Answer,
    Ask,
    Config,
    Elastic,
    complete,
    first_difference,
    ledger_path,
    server_spec,
    witness,
)
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.report import CheckFailed, Outcome, Recorder
from kvpatch.smoke.server import Server, serve

FIRST = Ask(prompt=300, answer=48, salt=21)
FOLLOW_UP = Ask(prompt=24, answer=48, salt=22)
_IDLE_SECONDS = 1
_FALLS_ASLEEP_SECONDS = 8.0
_POLL_SECONDS = 0.05
_COMMANDS = Elastic(on=True, commands=True)
# Of the weights that a file has, what must have slept: a backend may keep some in a form of its own.
_WEIGHTS_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """Two turns of a conversation: the answers, and with a sleep in between what was held before and during it."""

    answers: tuple[Answer, ...]
    before: Holdings | None = None
    asleep: Holdings | None = None


def check_sleep(recorder: Recorder, install: Install, config: Config, folder: Path) -> None:
    """Sleep by command and by itself, with weights in memory of the server's own."""
    copied = replace(config, copied=True)
    idle = replace(copied, words=("--sleep-idle-seconds", str(_IDLE_SECONDS)))
    awake: list[Talk] = []

    def by_command() -> Outcome:
        awake.append(_talk(install, copied, OFF, folder, None))
        return same_talk(awake[0], _talk(install, copied, _COMMANDS, folder, _command), config.model.path)

    def by_itself() -> Outcome:
        reference = awake[0] if awake else _talk(install, copied, OFF, folder, None)
        return same_talk(reference, _talk(install, idle, ON, folder, _wait), config.model.path)

    recorder.run("sleep: by command, and the conversation goes on", by_command)
    recorder.run(f"sleep: by itself after {_IDLE_SECONDS} s, and the conversation goes on", by_itself)


def _command(server: Server, held: Callable[[], Holdings]) -> None:
    server.json("POST", "/kvcached/sleep", json={}, timeout=20.0)


def _wait(server: Server, held: Callable[[], Holdings]) -> None:
    deadline = time.monotonic() + _FALLS_ASLEEP_SECONDS
    while held().asleep == 0:
        if time.monotonic() > deadline:
            raise server.failed(f"still awake {_FALLS_ASLEEP_SECONDS:g} s after the last request")
        time.sleep(_POLL_SECONDS)
    time.sleep(0.2)
    if not server.json("GET", "/props", timeout=20.0).get("is_sleeping"):
        raise server.failed("/props does not say that it sleeps")


def _talk(
    install: Install,
    config: Config,
    elastic: Elastic,
    folder: Path,
    sleep: Callable[[Server, Callable[[], Holdings]], None] | None,
) -> Talk:
    ledger = ledger_path(folder)
    with serve(server_spec(install, config, elastic, folder), folder) as server:
        first = complete(server, FIRST)
        before = asleep = None
        if sleep is not None:
            before = holdings(install, ledger, server.pid)
            sleep(server, lambda: holdings(install, ledger, server.pid))
            asleep = holdings(install, ledger, server.pid)
            seen = witness(install, ledger, server.log_text(), server.pid, settle=1.0)
            if seen is None or seen[0].usable:
                raise server.failed(f"asleep, the process may still use memory of its KV cache: {seen}")
        said: Sequence[int] = (*prompt_ids(FIRST.prompt, FIRST.salt), *first.tokens)
        second = complete(server, FOLLOW_UP, after=said)
        if server.returncode() is not None:
            raise server.failed(f"{server.name} ended by itself")
    return Talk(answers=(first, second), before=before, asleep=asleep)


def same_talk(awake: Talk, slept: Talk, model: Path) -> Outcome:
    """Everything was asleep, the weights of `model` too; the answers are those of a server that was awake,
    and as much of the follow-up came out of the cache."""
    before, during = slept.before, slept.asleep
    assert before is not None
    assert during is not None
    figures: dict[str, int | float | str] = {
        "KV before": before.kv,
        "weights before": before.weights,
        "compute before": before.compute,
        "asleep": during.asleep,
        "processed, awake": awake.answers[1].processed,
        "processed, slept": slept.answers[1].processed,
    }

    def failed(text: str) -> CheckFailed:
        return CheckFailed(text, figures=figures)

    if before.weights < model.stat().st_size * _WEIGHTS_SHARE:
        raise failed(f"{before.weights} bytes of weights can sleep, the model has {model.stat().st_size}")
    if during.kv or during.weights or during.compute:
        raise failed(
            f"asleep it holds {during.kv} bytes of KV, {during.weights} of weights, {during.compute} of compute"
        )
    # Compute buffers hold nothing worth keeping.
    if during.asleep < before.weights + before.kv - before.idle:
        raise failed(f"{during.asleep} bytes sleep, less than were in use")
    for number, (a, b) in enumerate(zip(awake.answers, slept.answers, strict=True), 1):
        if (a.tokens, a.alternatives) != (b.tokens, b.alternatives):
            where = first_difference(a.tokens, b.tokens)
            raise failed(
                f"answer {number} is another one than a server's that was awake, from token {where} on"
            )
    if slept.answers[1].processed != awake.answers[1].processed:
        raise failed("sleep cost prompt tokens that had to be processed again")
    return Outcome(
        f"{during.asleep} bytes slept, {slept.answers[1].processed} tokens of the follow-up were new", figures
    )
