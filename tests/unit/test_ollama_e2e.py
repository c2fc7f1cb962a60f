"""What the end-to-end runs of Ollama ask and how they judge, without a server."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from kvpatch.smoke.models import LLAMA, TinyModel
from tests.ollama_e2e import identity, verdict, watch
from tests.ollama_e2e.client import Answer, Failure, Outcome
from tests.ollama_e2e.kills import clear
from tests.ollama_e2e.questions import CRAMPED, questions
from tests.ollama_e2e.watch import Seen
from tests.ollama_e2e.zoo import Member

_MODEL = TinyModel(path=Path("none"), seed=1, shape=LLAMA, sha256="0")
_MEMBERS = (
    Member(name="one", model=_MODEL, contexts=(8192, 4096)),
    Member(name="two", model=_MODEL, contexts=(2048,), embeds=True),
)
_LIMIT = 1000
_GOOD = {"sleep": 3, "wake": 2, "wait": 5, "trim": 0, "unload": 0, "admit": 2, "refuse": 0, "start": 2}


def test_questions_are_those_of_the_seed() -> None:
    one, again, other = (questions(random.Random(seed), _MEMBERS, 12) for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 24
    assert {q.way for q in one if q.model == "two"} == {"embed"}
    assert {q.way for q in one if q.model == "one"} == {"generate", "chat"}
    assert {q.num_ctx for q in one if q.model == "one"} == {8192, 4096, CRAMPED}
    # Such an answer cannot end before its context is full, or its prompt is too long from the start.
    assert all(q.words + q.answer > CRAMPED for q in one if q.cramped)


def _outcome(**changes: object) -> Outcome:
    question = questions(random.Random(1), _MEMBERS, 1)[0]
    answer = Answer(text="ba be", reason="length", prompt_tokens=3, tokens=2)
    outcome = Outcome(question=question, streamed=False, at=0.0, seconds=1.0, answer=answer)
    return replace(outcome, **changes)  # type: ignore[arg-type]


def test_an_answer_that_differs_in_anything_is_told() -> None:
    good = _outcome()
    assert good.answer is not None
    answers = {good.question: good.answer}
    assert verdict.answered(verdict.tally([good], answers), answers) == []
    for other, words in (
        (replace(good.answer, text="ba bi"), "from character 4"),
        (replace(good.answer, tokens=3), "3 + 3 tokens"),
        (replace(good.answer, reason="stop"), "'stop' after"),
        (replace(good.answer, prompt_tokens=2), "2 + 2"),
        (replace(good.answer, vectors=((0.5,),)), "embeddings differ"),
    ):
        found = verdict.answered(verdict.tally([_outcome(answer=other)], answers), answers)
        assert "1 of 1 answers differ" in found[0]
        assert words in found[1]


def test_only_a_token_as_good_as_another_may_be_another() -> None:
    wanted = Answer(text="ba be bi", tokens=3, margins=((2, 1.0), (5, 0.001), (8, 1.0)))
    for text, tokens, ties in (
        ("ba bu bo", 3, 1),
        ("ba be bo", 3, 0),
        ("bu be bi", 3, 0),
        ("ba bu bo", 4, 0),
    ):
        outcome = _outcome(answer=Answer(text=text, tokens=tokens))
        found = verdict.tally([outcome], {outcome.question: wanted})
        assert (found.ties, len(found.wrong)) == (ties, 1 - ties), text
    shorter = _outcome(answer=Answer(text="ba be", tokens=3))
    assert not verdict.tie(shorter, wanted)


def test_a_failure_is_told_once_a_text_and_a_client_that_hung_up_is_none() -> None:
    failed = _outcome(answer=None, failure=Failure(status=500, text="no room"))
    answers = {_outcome().question: Answer(text="ba be", reason="length", prompt_tokens=3, tokens=2)}
    found = verdict.tally([failed, failed, _outcome(answer=None, dropped=True), _outcome()], answers)
    assert (found.answers, found.dropped, len(found.failures), found.asked) == (1, 1, 2, 4)
    problems = verdict.answered(verdict.tally([failed, failed, _outcome()], answers), answers)
    assert problems == ["2 of 3 requests failed (one; 1.0 s): status 500: no room"]
    assert verdict.answered(verdict.tally([], {}), {}) == ["nothing was answered"]


@pytest.mark.parametrize("missing", ["sleep", "wake", "wait"])
def test_a_run_without_pressure_shows_nothing(missing: str) -> None:
    seen = Seen(states={"asleep": 1})
    assert verdict.elastic(_GOOD, seen, _LIMIT) == []
    assert verdict.elastic({**_GOOD, missing: 0}, seen, _LIMIT) == [
        f"nothing in the log tells of a {missing}"
    ]


def test_what_was_seen_is_judged() -> None:
    assert "never showed" in verdict.elastic(_GOOD, Seen(states={"awake": 1}), _LIMIT)[0]
    slow = Seen(states={"asleep": 1}, slowest=9.0, over=3.0, peak=1200, problems={"odd"})
    assert [text.split()[0] for text in verdict.elastic(_GOOD, slow, _LIMIT)] == ["odd", "for", "/api/ps"]
    assert verdict.reloaded({"one": 1}, Seen(born={"one": {7}})) == []
    assert "started 2 times" in verdict.reloaded({"one": 2}, Seen(born={"one": {7, 8}}))[0]
    assert "2 processes" in verdict.reloaded({"one": 1}, Seen(born={"one": {7, 8}}))[0]


def test_decisions_are_counted_from_the_log() -> None:
    log = "\n".join(
        (
            'level=INFO msg="kvcached: put to sleep" model=one',
            'level=INFO msg="kvcached: woke" model=one',
            'level=INFO msg="kvcached: waiting for room" model=one',
            'level=WARN msg="kvcached: a claim is refused, nothing is left that could make room"',
            'level=INFO msg="connection refused"',
            'level=INFO msg="starting llama-server" cmd="llama-server --model /m/blobs/sha256-0a --port 1"',
        )
    )
    counts = watch.events(log)
    assert {kind for kind, count in counts.items() if count == 1} == {
        "sleep",
        "wake",
        "wait",
        "refuse",
        "start",
    }
    assert watch.children_logged(log, {"0a": "one"}) == {"one": 1}


def test_errors_after_a_kill() -> None:
    assert clear(Failure(status=500, text="llama-server process has terminated: signal: killed"))
    assert not clear(Failure(status=500, text="something"))
    assert not clear(Failure(status=500, text="llama-server process has terminated: out of memory"))


def test_two_faces_are_compared_to_the_type_and_the_order() -> None:
    one = {"a": 1, "b": [{"c": "x"}]}
    assert identity.differences(one, {"a": 1, "b": [{"c": "x"}]}) == []
    assert identity.differences(one, {"a": 1.0, "b": [{"c": "x"}]}) == ["/a: 1.0, stock 1"]
    assert identity.differences(one, {"a": 1, "b": [{"c": "y"}]}) == ["/b/0/c: 'y', stock 'x'"]
    assert identity.differences(one, {"a": 1}) == ["/b: only in stock: [{'c': 'x'}]"]
    assert identity.differences(one, {**one, "kvcached": None}) == ["/kvcached: not in stock: None"]
    assert "another order" in identity.differences(one, {"b": [{"c": "x"}], "a": 1})[0]
    assert identity.plain({"load_duration": 5, "created_at": "now", "size": 5}) == {
        "load_duration": "int",
        "created_at": "str",
        "size": 5,
    }
