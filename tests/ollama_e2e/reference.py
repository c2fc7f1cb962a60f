"""What stock answers to each question, to one client, and what its models occupy."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpatch.hashing import of_file
from kvpatch.smoke.install import Install
from kvpatch.smoke.ollama import loaded, stop, wait_gone
from tests.ollama_e2e import client, sides
from tests.ollama_e2e.client import Answer
from tests.ollama_e2e.questions import Question
from tests.ollama_e2e.sides import Side
from tests.ollama_e2e.zoo import Member

_SHOW_EVERY = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """`answers` to the questions that can be judged by: `unstable` ones stock breaks off, or answers in two ways,
    by what its caches hold. `sizes`: bytes of each model, its whole context allocated, by stock's /api/ps."""

    answers: dict[Question, Answer]
    unstable: tuple[Question, ...]
    sizes: dict[str, int]

    def sizes_of(self, members: Sequence[Member]) -> list[int]:
        """Of those that generate, the largest first."""
        return sorted((self.sizes[member.name] for member in members if not member.embeds), reverse=True)


def reference(
    install: Install,
    folder: Path,
    members: Sequence[Member],
    asked: Sequence[Question],
    rng: random.Random,
    say: Callable[[str], None],
) -> Reference:
    """Asks each twice, one after the other, the second time in another order; so it is answered with other contents
    of the cache. What was found is kept in `folder` for the next run there."""
    kept = _Kept(folder / "answers.json", of_file(install.llama_server))
    missing = [question for question in asked if question not in kept.answers]
    if missing or set(kept.sizes) != {member.name for member in members}:
        settings = {**sides.stock_settings(), "OLLAMA_MAX_LOADED_MODELS": "1"}
        with sides.start(install, folder, "reference", members, settings) as side:
            for member in members:
                kept.sizes[member.name] = _size(side, member)
            _ask_all(side, missing, rng, kept, say)
        kept.write()
    answers = {question: kept.answers[question] for question in asked}
    return Reference(
        answers={question: answer for question, answer in answers.items() if answer is not None},
        unstable=tuple(question for question, answer in answers.items() if answer is None),
        sizes=dict(kept.sizes),
    )


def _size(side: Side, member: Member) -> int:
    question = Question(
        model=member.name,
        way="embed" if member.embeds else "generate",
        salt=1,
        words=8,
        answer=2,
        num_ctx=member.contexts[0],
    )
    _sure(side, question)
    size = loaded(side.server)[member.name].size
    if size <= 0:
        raise side.server.failed(f"/api/ps of stock shows {size} bytes for {member.name}")
    stop(side.server, member.name)
    wait_gone(side.server, [member.name])
    return size


def _ask_all(
    side: Side, asked: Sequence[Question], rng: random.Random, kept: _Kept, say: Callable[[str], None]
) -> None:
    # Each num_ctx of a model is a load of its own in stock.
    groups: dict[tuple[str, int], list[Question]] = {}
    for question in asked:
        groups.setdefault((question.model, question.num_ctx), []).append(question)
    done = 0
    for group in groups.values():
        first = {question: _sure(side, question) for question in group}
        for question in rng.sample(group, len(group)):
            again = _sure(side, question, margins=True)
            # Ollama breaks off what repeats itself, and then never says that it is done: no answer to go by.
            whole = question.way == "embed" or bool(again.reason)
            kept.answers[question] = again if whole and again == first[question] else None
            done += 1
            if done % _SHOW_EVERY == 0:
                say(f"stock: {done} of {len(asked)} questions answered twice")


def _sure(side: Side, question: Question, *, margins: bool = False) -> Answer:
    outcome = client.ask(side.url, question, margins=margins)
    if outcome.answer is None:
        raise side.server.failed(f"stock did not answer {question}: {outcome.failure}")
    return outcome.answer


class _Kept:
    """Answers in a file. Those of another build of llama-server are not taken."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self.answers: dict[Question, Answer | None] = {}
        self.sizes: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["llama-server"] == digest:
                self.sizes = value["sizes"]
                for question, answer in value["answers"]:
                    self.answers[Question(**question)] = None if answer is None else _answer(answer)

    def write(self) -> None:
        rows = [
            (dataclasses.asdict(question), None if answer is None else dataclasses.asdict(answer))
            for question, answer in self.answers.items()
        ]
        value = {"llama-server": self.digest, "sizes": self.sizes, "answers": rows}
        self.path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _answer(value: dict[str, object]) -> Answer:
    vectors, margins = value.pop("vectors"), value.pop("margins")
    assert isinstance(vectors, list)
    assert isinstance(margins, list)
    return Answer(
        vectors=tuple(tuple(vector) for vector in vectors),
        margins=tuple((int(end), float(margin)) for end, margin in margins),
        **value,  # type: ignore[arg-type]
    )
