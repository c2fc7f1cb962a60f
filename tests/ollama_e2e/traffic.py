"""Eight clients at once, for some time."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpatch.process import ProcessFailure
from tests.ollama_e2e import client
from tests.ollama_e2e.client import Outcome
from tests.ollama_e2e.questions import Question
from tests.ollama_e2e.sides import Side

CLIENTS = 8
# The one model of mixed traffic that is asked with keep_alive -1 and nothing else, and never stopped.
PINNED = "e2e-a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manners:
    """What clients do beside asking: how many hang up, keep_alive of a request (None: the server's own), and how often
    `ollama stop` is called, in seconds."""

    hang_up: float = 0.0
    keep_alive: tuple[str | int | None, ...] = (None,)
    stop_every: float | None = None


PLAIN = Manners()
RUDE = Manners(hang_up=0.15, keep_alive=(None, None, None, 0, "1s", "300ms", -1), stop_every=2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """`stops`: `ollama stop` that found its model; `errors`: what went wrong with others."""

    outcomes: tuple[Outcome, ...]
    stops: int
    errors: tuple[str, ...]


def play(
    side: Side,
    asked: Sequence[Question],
    rng: random.Random,
    *,
    seconds: float,
    manners: Manners = PLAIN,
    say: Callable[[str], None] = lambda text: None,
) -> Done:
    """Each client asks what it draws, one request after the other, until the time is over; a request that has begun is
    waited for."""
    outcomes: list[Outcome] = []
    lock = threading.Lock()
    deadline = time.monotonic() + seconds
    errors: list[str] = []
    raised: list[BaseException] = []
    stops = 0

    def body(number: int) -> None:
        try:
            own = random.Random(f"{rng_seed} {number}")
            while time.monotonic() < deadline:
                outcome = _one(side, asked, own, manners)
                with lock:
                    outcomes.append(outcome)
                # Some clients think between requests: else nothing would ever be idle.
                time.sleep(own.choice((0.0, 0.0, 0.1, 0.5)))
        except BaseException as error:
            raised.append(error)

    def stopper() -> None:
        nonlocal stops
        own = random.Random(f"{rng_seed} stop")
        names = sorted({question.model for question in asked} - {PINNED})
        assert manners.stop_every is not None
        while time.monotonic() < deadline:
            time.sleep(own.uniform(0.2, 2 * manners.stop_every))
            name = own.choice(names)
            try:
                side.instance.command(side.server.port, "stop", name)
                stops += 1
            except ProcessFailure as failure:
                # Not loaded just now.
                if "not found" not in failure.tail and "couldn't find model" not in failure.tail:
                    errors.append(f"ollama stop {name}: {failure.tail}")

    rng_seed = rng.randrange(2**31)
    threads = [threading.Thread(target=body, args=(number,)) for number in range(CLIENTS)]
    if manners.stop_every is not None:
        threads.append(threading.Thread(target=stopper))
    for thread in threads:
        thread.start()
    _wait(threads, outcomes, say)
    if raised:
        raise raised[0]
    return Done(outcomes=tuple(outcomes), stops=stops, errors=tuple(errors))


def _wait(threads: Sequence[threading.Thread], outcomes: list[Outcome], say: Callable[[str], None]) -> None:
    shown = time.monotonic()
    for thread in threads:
        while thread.is_alive():
            thread.join(1.0)
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                failed = sum(outcome.failure is not None for outcome in outcomes)
                say(f"{len(outcomes)} requests, {failed} failed")


def _one(side: Side, asked: Sequence[Question], rng: random.Random, manners: Manners) -> Outcome:
    question = rng.choice(asked)
    stream = rng.random() < 0.5
    if rng.random() < manners.hang_up and question.way != "embed" and question.model != PINNED:
        # Before anything came, at once or later, or after some pieces.
        return client.hang_up(
            side.url,
            question,
            after_pieces=rng.choice((0, 1, 3)),
            wait=rng.choice((0.05, 0.5, 5.0)),
        )
    keep_alive = rng.choice(manners.keep_alive)
    if len(manners.keep_alive) > 1 and question.model == PINNED:
        keep_alive = -1
    return client.ask(side.url, question, stream=stream, keep_alive=keep_alive)


def warm(
    side: Side, asked: Sequence[Question], *, keep_alive: str | int | None = None
) -> tuple[Outcome, ...]:
    """One question of each model, in turn, alone."""
    first: dict[str, Question] = {}
    for question in asked:
        first.setdefault(question.model, question)
    return tuple(client.ask(side.url, question, keep_alive=keep_alive) for question in first.values())


@contextlib.contextmanager
def in_background(what: Callable[[], Outcome]):  # type: ignore[no-untyped-def]
    """Runs a request beside the block; the list has its outcome after it."""
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(what()))
    thread.start()
    try:
        yield found
    finally:
        thread.join()
