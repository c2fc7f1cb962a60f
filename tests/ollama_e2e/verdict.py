"""What a run has shown, and whether it is good. Nothing here talks to a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.ollama_e2e.client import Answer, Outcome
from tests.ollama_e2e.questions import Question
from tests.ollama_e2e.watch import Seen

# How far apart two tokens' log-probabilities must be for rounding not to turn them: what stock's own answer to one
# question varies by, as its cache holds none, some or all of the prompt, is about a hundredth.
TIE = 0.04
TIES = 0.1  # of the answers, at most
OVER_SECONDS = 1.5  # that more than the limit may show as charged
PS_SECONDS = 5.0  # in which /api/ps must answer, however busy the machine
_SHOWN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Requests by what became of them. `ties` leave stock's answer where its two best tokens were as good as equal: so
    does stock, with another part of the prompt in its cache."""

    answers: int
    dropped: int
    failures: tuple[Outcome, ...]
    wrong: tuple[Outcome, ...]
    ties: int
    slowest: float

    @property
    def asked(self) -> int:
        return self.answers + self.dropped + len(self.failures)


def tally(outcomes: Sequence[Outcome], answers: Mapping[Question, Answer]) -> Tally:
    answered = [outcome for outcome in outcomes if outcome.answer is not None]
    other = [outcome for outcome in answered if outcome.answer != answers[outcome.question]]
    wrong = tuple(outcome for outcome in other if not tie(outcome, answers[outcome.question]))
    return Tally(
        answers=len(answered),
        dropped=sum(outcome.dropped for outcome in outcomes),
        failures=tuple(outcome for outcome in outcomes if outcome.failure is not None),
        wrong=wrong,
        ties=len(other) - len(wrong),
        slowest=max((outcome.seconds for outcome in outcomes), default=0.0),
    )


def tie(outcome: Outcome, wanted: Answer) -> bool:
    """Whether all but the text is equal, and the text up to a token that another could have been."""
    got = outcome.answer
    assert got is not None
    if dataclasses.replace(got, text=wanted.text) != wanted:
        return False
    at = leaves(got.text, wanted.text)
    return next((margin for end, margin in wanted.margins if end > at), TIE) < TIE


def leaves(text: str, wanted: str) -> int:
    """From which character on it is another."""
    shorter = min(len(text), len(wanted))
    return next((at for at in range(shorter) if text[at] != wanted[at]), shorter)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Of one part of a run. `started`: children by model, by the log; `figures`: what is only shown."""

    name: str
    problems: tuple[str, ...]
    tally: Tally | None = None
    events: Mapping[str, int] = field(default_factory=dict)
    started: Mapping[str, int] = field(default_factory=dict)
    seen: Seen | None = None
    figures: Mapping[str, object] = field(default_factory=dict)


def answered(found: Tally, answers: Mapping[Question, Answer]) -> list[str]:
    """No request may fail, and every answer is stock's."""
    problems = []
    if not found.answers:
        problems.append("nothing was answered")
    texts: dict[str, list[Outcome]] = {}
    for outcome in found.failures:
        assert outcome.failure is not None
        texts.setdefault(f"status {outcome.failure.status}: {outcome.failure.text}", []).append(outcome)
    for text, outcomes in sorted(texts.items(), key=lambda item: -len(item[1]))[:_SHOWN]:
        models = sorted({outcome.question.model for outcome in outcomes})
        slow = max(outcome.seconds for outcome in outcomes)
        problems.append(
            f"{len(outcomes)} of {found.asked} requests failed ({', '.join(models)}; {slow:.1f} s): {text}"
        )
    if len(texts) > _SHOWN:
        problems.append(f"and {len(texts) - _SHOWN} other texts of failures")
    if found.wrong:
        cramped = sum(outcome.question.cramped for outcome in found.wrong)
        problems.append(
            f"{len(found.wrong)} of {found.answers} answers differ from stock's, {cramped} of them with a num_ctx "
            "that the request fills"
        )
        first = {outcome.question: outcome for outcome in reversed(found.wrong)}
        problems += [difference(outcome, answers[outcome.question]) for outcome in [*first.values()][:_SHOWN]]
    if found.ties > max(2, TIES * found.answers):
        problems.append(
            f"{found.ties} of {found.answers} answers leave stock's at two tokens as good as equal"
        )
    return problems


def difference(outcome: Outcome, wanted: Answer) -> str:
    """Where an answer leaves stock's."""
    got = outcome.answer
    assert got is not None
    if got.vectors != wanted.vectors:
        return f"{outcome.question}: embeddings differ"
    if got.text == wanted.text:
        return (
            f"{outcome.question}: same text, but {got.reason!r} after {got.prompt_tokens} + {got.tokens} tokens, "
            f"stock {wanted.reason!r} after {wanted.prompt_tokens} + {wanted.tokens}"
        )
    at = leaves(got.text, wanted.text)
    return (
        f"{outcome.question}: from character {at} on {got.text[at : at + 40]!r} ({got.prompt_tokens} + {got.tokens} "
        f"tokens), stock {wanted.text[at : at + 40]!r} ({wanted.prompt_tokens} + {wanted.tokens})"
    )


def elastic(events: Mapping[str, int], seen: Seen, limit: int) -> list[str]:
    """The run is worth something only where models slept, woke and waited for room, under the limit."""
    problems = [
        f"nothing in the log tells of a {kind}" for kind in ("sleep", "wake", "wait") if not events[kind]
    ]
    if "asleep" not in seen.states:
        problems.append(f"/api/ps never showed a model asleep, but {seen.states}")
    problems += sorted(seen.problems)
    if seen.over > OVER_SECONDS:
        problems.append(
            f"for {seen.over:.1f} s more than the limit of {limit} bytes was charged, up to {seen.peak}"
        )
    if seen.slowest > PS_SECONDS:
        problems.append(f"/api/ps took {seen.slowest:.1f} s")
    return problems


def reloaded(started: Mapping[str, int], seen: Seen, most: int = 1) -> list[str]:
    """Where a sleep would do, no model is unloaded: one process each, for all of the run."""
    problems = [
        f"{name} was started {count} times: a sleep would have done"
        for name, count in sorted(started.items())
        if count > most
    ]
    for name, pids in sorted(seen.born.items()):
        if len(pids) > max(most, started.get(name, 0)):
            problems.append(
                f"{name} had {len(pids)} processes, of which the log tells of {started.get(name, 0)}"
            )
    return problems
