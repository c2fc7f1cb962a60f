"""What a soak asks and does, made from a seed: the same for every server that plays it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

# "trim", "sleep" and "wake" are for servers with elastic memory: a stock one skips them.
Action = Literal["trim", "sleep", "wake", "erase"]
After = Literal["", "drop", "reload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A completion: the first `length` word ids of pattern `salt`, then `answer` tokens generated. Two of one
    salt are one conversation: the shorter prompt is a prefix of the longer."""

    salt: int
    length: int
    answer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt, and what its client does: `drop` closes the stream half-way, `reload` saves the slot after the
    answer, erases and restores it."""

    prompt: Prompt
    after: After = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What is done beside the requests: `wait` seconds after the step before. `http`: by the server's own route, else
    through the ledger."""

    wait: float
    action: Action
    slot: int = 0
    http: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Requests by client (all clients run at once), and the steps beside them. `pinned`: a client keeps its slot."""

    number: int
    clients: tuple[tuple[Request, ...], ...]
    steps: tuple[Step, ...]
    pinned: bool


class Schedule:
    """Rounds for one kind of server: `slots` at once, prompts and answers up to these lengths."""

    def __init__(self, rng: random.Random, *, slots: int, longest: int, answer: int) -> None:
        self._rng = rng
        self._slots, self._longest, self._answer = slots, longest, answer
        self._asked: list[Prompt] = []
        self._number = 0

    @property
    def largest(self) -> Prompt:
        """The prompt that takes the most room of all that may come."""
        return Prompt(salt=0, length=self._longest, answer=self._answer)

    def next(self) -> Round:
        rng = self._rng
        self._number += 1
        pinned = rng.random() < 0.5
        clients = tuple(
            tuple(self._request(pinned) for _ in range(rng.randint(2, 4))) for _ in range(self._slots)
        )
        steps = tuple(self._step() for _ in range(rng.randint(4, 10)))
        return Round(number=self._number, clients=clients, steps=steps, pinned=pinned)

    def _request(self, pinned: bool) -> Request:
        rng = self._rng
        draw = rng.random()
        after: After = "drop" if draw < 0.1 else "reload" if draw < 0.25 and pinned else ""
        return Request(prompt=self._prompt(), after=after)

    def _prompt(self) -> Prompt:
        rng = self._rng
        if self._asked and rng.random() < 0.5:
            old = rng.choice(self._asked[-24:])
            grown = min(self._longest, old.length + rng.randint(1, 300))
            return (
                old if rng.random() < 0.6 or grown == old.length else self._keep(old.salt, grown, old.answer)
            )
        # Many short ones and some long: lengths are spread evenly over their logarithm.
        length = round(8 * (self._longest / 8) ** rng.random())
        return self._keep(rng.randrange(1, 2**20), length, rng.randint(4, self._answer))

    def _keep(self, salt: int, length: int, answer: int) -> Prompt:
        prompt = Prompt(salt=salt, length=length, answer=answer)
        self._asked.append(prompt)
        return prompt

    def _step(self) -> Step:
        rng = self._rng
        action: Action = rng.choice(("trim", "sleep", "sleep", "wake", "erase"))
        return Step(
            wait=rng.choice((0.0, 0.02, 0.1, 0.3)),
            action=action,
            slot=rng.randrange(self._slots),
            http=rng.random() < 0.5,
        )
