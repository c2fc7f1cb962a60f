"""The verdicts on what servers showed, on made-up showings: each must pass on good figures and fail on bad
ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from kvpatch import demo
from kvpatch.demo import DemoRow
from kvpatch.smoke import llama_checks as checks
from kvpatch.smoke import memory_checks, models, ollama_checks, smaps
from kvpatch.smoke.holdings import Holdings
from kvpatch.smoke.llama import Answer, Config, Sample, Session, first_difference, kv_ranges, log_peak
from kvpatch.smoke.ollama import Instance
from kvpatch.smoke.ollama_checks import Talk
from kvpatch.smoke.report import CheckFailed, Outcome
from kvpatch.smoke.sleep_checks import Talk as Conversation
from kvpatch.smoke.sleep_checks import same_talk

_STEP = 2 * 4 * 128 * 256  # K and V, 4 layers, 128 bytes a cell, 256 cells
_CELLS = 8192
_FULL = _STEP * _CELLS // 256


def _answer(*tokens: int, logprob: float = -0.5, truncated: bool = False) -> Answer:
    return Answer(
        tokens=tokens,
        alternatives=tuple(((t, logprob), (t + 1, logprob - 1)) for t in tokens),
        text="",
        truncated=truncated,
    )


def _sample(moment: str, mapped: int, cells: int = 0) -> Sample:
    return Sample(
        moment=moment,
        mapped=mapped,
        reserved=_FULL,
        usable=mapped,
        held_min=mapped,
        held_max=mapped,
        cells=cells,
    )


@pytest.fixture
def session(tmp_path: Path) -> Session:
    model = models.TinyModel(path=tmp_path / "m.gguf", seed=1, shape=models.LLAMA, sha256="")
    return Session(
        config=Config(name="llama", model=model, flash=True, cells=_CELLS),
        asks=2,
        answers=(_answer(1, 2, 3), _answer(4, 5, 6), _answer(1, 2, 3)),
        samples=(
            _sample("start", 0),
            _sample("ask 1", _STEP, 200),
            _sample("ask 2", 5 * _STEP, 1200),
            _sample("held", 5 * _STEP, 1200),
            _sample("rested", 5 * _STEP, 1200),
            _sample("erased", 0),
        ),
        erase_seconds=0.1,
        shifts=0,
        elastic_lines=7,
        log=tmp_path / "log",
        logs={"llama-server": "its last line"},
    )


def _with(session: Session, moment: str, **changes: int) -> Session:
    return replace(
        session,
        samples=tuple(replace(s, **changes) if s.moment == moment else s for s in session.samples),
    )


_VERDICTS = (
    memory_checks.memory_at_start,
    memory_checks.memory_grows,
    memory_checks.memory_kept,
    memory_checks.memory_rested,
    memory_checks.memory_falls,
    memory_checks.memory_witnessed,
)


@pytest.mark.parametrize("verdict", _VERDICTS)
def test_good_memory_passes(session: Session, verdict: Callable[[Session], Outcome]) -> None:
    assert verdict(session).figures


@pytest.mark.parametrize("verdict", _VERDICTS)
def test_no_figures_never_pass(session: Session, verdict: Callable[[Session], Outcome]) -> None:
    with pytest.raises(CheckFailed, match="no figures of an elastic cache"):
        verdict(replace(session, samples=()))


@pytest.mark.parametrize(
    ("verdict", "moment", "changes", "says"),
    [
        (memory_checks.memory_at_start, "start", {"reserved": _FULL // 2}, "the context takes"),
        (memory_checks.memory_at_start, "start", {"mapped": _FULL // 5}, "more than a tenth"),
        (memory_checks.memory_grows, "ask 1", {"mapped": _STEP // 2}, "expected"),
        (memory_checks.memory_grows, "ask 2", {"mapped": 9 * _STEP}, "expected"),
        (memory_checks.memory_grows, "start", {"mapped": _STEP}, "did not grow"),
        (memory_checks.memory_kept, "held", {"mapped": 4 * _STEP}, "a while later"),
        (memory_checks.memory_kept, "held", {"mapped": 7 * _STEP}, "a while later"),
        (memory_checks.memory_rested, "rested", {"mapped": 6 * _STEP}, "expected"),
        (memory_checks.memory_rested, "rested", {"mapped": 4 * _STEP}, "expected"),
        (memory_checks.memory_falls, "erased", {"mapped": 2 * _STEP}, "more than one step"),
        (memory_checks.memory_falls, "erased", {"usable": 2 * _STEP}, "more than one step"),
        (memory_checks.memory_falls, "ask 2", {"mapped": 0}, "did not fall"),
        (memory_checks.memory_witnessed, "ask 1", {"usable": 2 * _STEP}, "by the kernel"),
        (memory_checks.memory_witnessed, "held", {"held_min": 6 * _STEP}, "the kernel holds"),
        (memory_checks.memory_witnessed, "ask 2", {"held_max": _STEP}, "the kernel holds"),
    ],
)
def test_bad_memory_fails_with_logs(
    session: Session,
    verdict: Callable[[Session], Outcome],
    moment: str,
    changes: dict[str, int],
    says: str,
) -> None:
    with pytest.raises(CheckFailed, match=says) as caught:
        verdict(_with(session, moment, **changes))
    assert caught.value.logs == {"llama-server": "its last line"}


def test_equal_answers_pass(session: Session) -> None:
    assert checks.same_answers(session, session).figures["tokens"] == 9


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ((_answer(1, 2, 9), _answer(4, 5, 6), _answer(1, 2, 3)), "answer 1 differs from token 3"),
        ((_answer(1, 2, 3), _answer(4, 5, 6, logprob=-0.5000001), _answer(1, 2, 3)), "other probabilities"),
        ((_answer(1, 2, 3), _answer(4, 5, 6), _answer(1, 2, 7)), "answer 3 differs"),
    ],
)
def test_any_difference_fails(session: Session, answers: tuple[Answer, ...], says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        checks.same_answers(session, replace(session, answers=answers))


def test_an_answer_that_erasing_changed_fails(session: Session) -> None:
    both = replace(session, answers=(_answer(1, 2, 3), _answer(4, 5, 6), _answer(1, 2, 7)))
    with pytest.raises(CheckFailed, match="after erasing"):
        checks.same_answers(both, both)


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_what_is_read_from_a_log() -> None:
    assert kv_ranges("llama_kv_cache: size = 8.00 MiB\n") == ()
    text = (
        "kvcached: region base=0x7f0000000000 size=8192 name=cache\n"
        "kvcached: CPU KV reserved = 0.01 MiB, mapped = 0.00 MiB, page = 4 KiB, limit = none\n"
    )
    assert kv_ranges(text) == (smaps.Range(start=0x7F0000000000, size=8192),)
    assert log_peak(text) == 0
    text += "kvcached: mapped = 4096 reserved = 8192 on CPU\nkvcached: mapped = 8192 reserved = 8192 on CPU\n"
    assert log_peak(text + "kvcached: mapped = 0 reserved = 8192 on CPU\n") == 8192


_AWAKE = Holdings(kv=_STEP, weights=1000, compute=500, idle=_STEP // 4, asleep=0, charge=_STEP + 1500)
_ASLEEP = Holdings(kv=0, weights=0, compute=0, idle=0, asleep=_STEP + 1500, charge=0)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(bytes(1000))
    return path


def test_a_conversation_that_slept_passes(weights: Path) -> None:
    answers = (_answer(1, 2), replace(_answer(3, 4), processed=25))
    slept = Conversation(answers=answers, before=_AWAKE, asleep=_ASLEEP)
    outcome = same_talk(Conversation(answers=answers), slept, weights)
    assert outcome.figures["asleep"] == _ASLEEP.asleep


@pytest.mark.parametrize(
    ("before", "asleep", "second", "says"),
    [
        ({"weights": 0}, {}, {}, "0 bytes of weights can sleep"),
        ({}, {"weights": 1000}, {}, "asleep it holds"),
        ({}, {"kv": 4096}, {}, "asleep it holds"),
        ({}, {"compute": 4096}, {}, "asleep it holds"),
        ({}, {"asleep": _STEP // 2}, {}, "less than were in use"),
        ({}, {}, {"tokens": (3, 5)}, "answer 2 is another one"),
        ({}, {}, {"processed": 326}, "had to be processed again"),
    ],
)
def test_a_conversation_that_lost_by_sleeping_fails(
    weights: Path, before: dict[str, int], asleep: dict[str, int], second: dict[str, object], says: str
) -> None:
    answers = (_answer(1, 2), replace(_answer(3, 4), processed=25))
    slept = Conversation(
        answers=(answers[0], cast(Answer, replace(answers[1], **second))),  # type: ignore[arg-type]
        before=replace(_AWAKE, **before),
        asleep=replace(_ASLEEP, **asleep),
    )
    with pytest.raises(CheckFailed, match=says):
        same_talk(Conversation(answers=answers), slept, weights)


def _row(moment: str, mapped: int, equal: bool | None) -> DemoRow:
    return DemoRow(
        moment=moment,
        stock_reserved=_FULL,
        stock_mapped=_FULL,
        stock_resident=2 * _FULL,
        elastic_reserved=_FULL,
        elastic_mapped=mapped,
        elastic_resident=mapped,
        tokens_equal=equal,
    )


_EQUAL = (None, True, True, True)


@pytest.mark.parametrize(
    ("mapped", "equal", "says"),
    [
        ((0, 1, 5, 0), _EQUAL, None),
        ((0, 1, 5, 0), (None, True, False, True), "after a long prompt, the tokens differ"),
        ((0, 1, 5, 0), (None, None, None, None), "no tokens were compared"),
        ((4, 5, 6, 0), _EQUAL, "at start"),
        ((0, 5, 5, 0), _EQUAL, "do not grow"),
        ((0, 1, 5, 4), _EQUAL, "after release"),
    ],
)
def test_demo_says_what_is_not_as_promised(
    mapped: tuple[int, ...], equal: tuple[bool | None, ...], says: str | None
) -> None:
    rows = [_row(m, n * _STEP, e) for m, n, e in zip(demo.MOMENTS, mapped, equal, strict=True)]
    problems = demo._problems(rows, 0.99)
    if says is None:
        assert problems == ()
    else:
        assert len(problems) == 1
        assert says in problems[0]


def test_demo_fails_when_the_fall_takes_too_long() -> None:
    rows = [
        _row(m, n * _STEP, e)
        for m, n, e in zip(demo.MOMENTS, (0, 1, 5, 0), (None, True, True, True), strict=True)
    ]
    assert demo._problems(rows, 1.0) == ()
    (problem,) = demo._problems(rows, 1.24)
    assert "fell 1.24 s after release, 1 s is promised" in problem


def test_demo_reads_a_stock_cache_as_a_run_of_present_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def mapping(start: int, size: int, perms: str = "rw-p", name: str = "") -> smaps.Mapping:
        return smaps.Mapping(start=start, end=start + size, perms=perms, name=name, rss=size, swap=0)

    runs = {1: _FULL // 2, 2: _FULL + 4096, 3: 10 * _FULL, 4: 10 * _FULL, 5: _FULL // 4}
    monkeypatch.setattr(smaps, "longest_present_run", lambda pid, m: runs[m.start])
    wrong = [mapping(3, 2 * _FULL, "---p"), mapping(4, 2 * _FULL, name="/a/file"), mapping(5, _FULL // 4)]
    assert demo._held(1, [*wrong, mapping(1, _FULL), mapping(2, 2 * _FULL)], _FULL) == _FULL
    assert demo._held(1, [*wrong, mapping(1, _FULL)], _FULL) == _FULL // 2
    assert demo._held(1, wrong, _FULL) == 0


def _talk(**memory: int) -> Talk:
    words = " ".join(models.prompt_text(64, 5).split())
    texts = {"generate": words}
    for turn in (1, 2, 3):
        texts[f"kv-first, turn {turn}"] = words
        texts[f"kv-second, turn {turn}"] = models.prompt_text(64, 6)
    figures = {"lease, both": 10, "charge, both": 12}
    for moment, mapped in (("short", _STEP), ("long", 12 * _STEP)):
        figures.update({f"{moment}: {key}": mapped for key in ("kv_mapped", "ledger", "usable", "held_max")})
        figures.update({f"{moment}: held_min": 0, f"{moment}: limit": 10**9, f"{moment}: kv_reserved": _FULL})
        figures.update({f"{moment}: lease": 500, f"{moment}: compute": 70, f"{moment}: charge": 570 + mapped})
        figures[f"{moment}: weights"] = 400
        figures[f"{moment}: size"] = 470 + mapped
    return Talk(texts=texts, vectors=((1.0, 2.0),), pieces=9, memory={**figures, **memory})


def test_ollama_verdicts_pass_on_good_figures(session: Session) -> None:
    talk = _talk()
    assert ollama_checks._same(talk, talk)
    assert ollama_checks._alternate(talk)
    assert ollama_checks._memory(talk, session.config.model)


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ({"short: kv_mapped": 2 * _STEP}, "/api/ps says"),
        ({"long: usable": _STEP}, "/api/ps says"),
        ({"long: held_min": 13 * _STEP}, "/api/ps says"),
        ({"long: held_max": _STEP}, "/api/ps says"),
        ({"short: limit": 5}, "config.yaml sets a limit"),
        ({"short: kv_reserved": _STEP}, "reserved for a cache"),
        ({"short: kv_reserved": 2 * _FULL}, "reserved for a cache"),
        ({"short: charge": 571 + _STEP}, "weights are counted twice"),
        ({"long: size": 470 + 11 * _STEP}, "the model's size is"),
    ],
)
def test_ollama_memory_fails_on_bad_figures(session: Session, memory: dict[str, int], says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        ollama_checks._memory(_talk(**memory), session.config.model)


def test_ollama_answers_must_be_equal_rich_and_of_each_model() -> None:
    talk = _talk()
    other = replace(talk, texts={**talk.texts, "generate": "ba be"})
    with pytest.raises(CheckFailed, match="with the cache off"):
        ollama_checks._same(talk, other)
    with pytest.raises(CheckFailed, match="distinct syllables"):
        ollama_checks._same(other, other)
    with pytest.raises(CheckFailed, match="embeddings differ"):
        ollama_checks._same(talk, replace(talk, vectors=((1.0, 3.0),)))
    with pytest.raises(CheckFailed, match="answers otherwise"):
        ollama_checks._alternate(replace(talk, texts={**talk.texts, "kv-first, turn 3": "ba"}))
    alike = {
        key.replace("kv-first", "kv-second"): text for key, text in talk.texts.items() if "kv-first" in key
    }
    with pytest.raises(CheckFailed, match="answer alike"):
        ollama_checks._alternate(replace(talk, texts={**talk.texts, **alike}))


def test_a_limit_that_is_only_announced_is_no_refusal() -> None:
    start = "kvcached: CPU KV reserved = 8.00 MiB, mapped = 0.00 MiB, page = 4 KiB, limit = 2097152 bytes\n"
    assert not checks.refusal_logged(start)
    assert checks.refusal_logged(
        f"{start}kvcached: no room for 512 cells: KVCACHED_E_LIMIT: the memory limit"
    )


class _CommandLine:
    """Stands for an instance whose command line answers with these texts."""

    def __init__(self, **texts: str) -> None:
        self._texts = texts

    def command(self, port: int, *words: str) -> str:
        return self._texts[words[0].lstrip("-")]


def test_the_version_must_name_the_series() -> None:
    shown = f"{ollama_checks.ENABLED} {ollama_checks.MEMORY} {ollama_checks.IDLE}"
    named = "kvpatch 0.1.0, series llama-server-0123456789ab, Ollama 0.32.15"
    good = _CommandLine(serve=shown, version=f"ollama version is 0.32.15\n{named}")
    assert ollama_checks._help(cast(Instance, good)).detail == named
    for text in ("", "ollama version is 0.32.15"):
        with pytest.raises(CheckFailed, match="patch series"):
            ollama_checks._help(cast(Instance, _CommandLine(serve=shown, version=text)))
