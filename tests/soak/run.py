"""The course of a soak: servers of all profiles side by side, rounds in turn, then what is asked alone, then
the verdict."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvpatch import runtime
from kvpatch.smoke.holdings import library
from kvpatch.smoke.install import Install
from tests.soak import play, sides, verdict
from tests.soak.profiles import profiles
from tests.soak.schedule import Prompt, Request, Round, Schedule
from tests.soak.sides import Answered, Device, Held, Profile, Side
from tests.soak.verdict import Evidence, Tally

Say = Callable[[str], None]
_FOR_ROUNDS = 0.8  # of the time; the rest is for starting, asking alone and stopping
_AT_LAST = 1.1  # what differed is asked alone until then, though it be late
_EMPTY_EVERY = 3  # rounds of a profile, in a soak; every round of a shorter one
_SOAK_MINUTES = 5
_CONTROL_EVERY = 2
_ALONE = 4  # prompts of each profile that are asked alone though nothing was wrong with them


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`env`: of the patched servers. `only`: names of profiles, all without any."""

    stock: Install
    patched: Install
    folder: Path
    seed: int
    minutes: float
    device: Device = "cpu"
    model: Path | None = None
    env: dict[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    seed: int
    seconds: float
    rounds: int
    evidence: tuple[Evidence, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


class _Course:
    """One profile's servers, schedule and results so far."""

    def __init__(self, options: Options, profile: Profile, stack: contextlib.ExitStack, say: Say) -> None:
        self.options, self.profile = options, profile
        self.folder = options.folder / profile.name
        rng = random.Random(f"{options.seed} {profile.name}")
        self.rng = rng
        self.schedule = Schedule(rng, slots=profile.slots, longest=profile.longest, answer=profile.answer)
        self.expected: dict[Prompt, Answered] = {}
        self.control, self.patched = Tally(), Tally()
        self.held: list[Held] = []
        self.control_held: list[Held] = []
        self.rounds = 0
        self.limit = self._limit()
        say(f"{profile.name}: limit {self.limit} bytes")
        self.reference = stack.enter_context(self._start(options.stock, "stock-alone", slots=1))
        self.stock = stack.enter_context(self._start(options.stock, "stock"))
        self.elastic = stack.enter_context(self._start(options.patched, "patched", limit=self.limit))
        self.fresh = self.elastic.empty()

    def _start(
        self, install: Install, name: str, *, slots: int | None = None, limit: int | None = None
    ) -> contextlib.AbstractContextManager[Side]:
        elastic = install is self.options.patched
        return sides.start(
            install,
            self.profile,
            self.folder,
            name=name,
            device=self.options.device,
            library_of=self.options.patched,
            elastic=elastic,
            slots=slots,
            limit=limit,
            extra=self.options.env if elastic else None,
        )

    def _limit(self) -> int:
        """What a server holds that has just begun, and the profile's share of what its largest request adds alone."""
        with self._start(self.options.patched, "probe") as side:
            before = side.empty().claim
            side.ask(Request(prompt=self.schedule.largest))
            most = max(side.peak(), sum(slot.claim for slot in side.slots()))
        return before + round((most - before) * self.profile.room)

    def round(self) -> None:
        """The next round, on the patched server and, every other time, on the stock one too."""
        next_ = self.schedule.next()
        for client in next_.clients:
            for request in client:
                if request.prompt not in self.expected:
                    asked = Request(prompt=request.prompt)
                    self.expected[request.prompt] = self.reference.ask(asked, slot=0, cached=False)
        control = self.rounds % _CONTROL_EVERY == 0
        self.rounds += 1
        self._play(self.elastic, next_, self.patched, self.held)
        if control:
            self._play(self.stock, next_, self.control, self.control_held)
        play.rest(self.elastic)

    def _play(self, side: Side, next_: Round, tally: Tally, held: list[Held]) -> None:
        for answer in play.play(side, next_):
            tally.add(answer, self.expected[answer.request.prompt])
        every = _EMPTY_EVERY if self.options.minutes >= _SOAK_MINUTES else 1
        if self.rounds % every == 1 % every:
            held.append(replace(side.empty(), answers=tally.answers))

    def alone(self, deadline: float) -> tuple[int, int, tuple[Prompt, ...]]:
        """Asks alone, on a patched server of one slot and no limit, what differed or was refused, and some
        more: how many were asked, for how many of those that differed or were refused there was no time, and
        which differ from stock in tokens or log-probabilities. It sleeps before each."""
        suspects = [*dict.fromkeys(self.patched.mismatches), *dict.fromkeys(self.patched.refused)]
        others = [prompt for prompt in self.expected if prompt not in suspects]
        prompts = [*suspects, *self.rng.sample(others, min(_ALONE, len(others)))]
        differ: list[Prompt] = []
        asked = 0
        with self._start(self.options.patched, "patched-alone", slots=1) as side:
            for prompt in prompts:
                if time.monotonic() > deadline:
                    break
                side.do("sleep")
                answer = side.ask(Request(prompt=prompt), slot=0, cached=False)
                asked += 1
                wanted = self.expected[prompt]
                if (answer.tokens, answer.logprobs) != (wanted.tokens, wanted.logprobs):
                    differ.append(prompt)
        return asked, max(0, len(suspects) - asked), tuple(differ)

    def evidence(self, asked: int, unasked: int, differ: tuple[Prompt, ...]) -> Evidence:
        """What was found; the servers have ended."""
        left = 0
        for path in self.folder.glob("*/ledger*"):
            with runtime.Ledger(path, library=library(self.options.patched.root)) as ledger:
                left += len(ledger.slots())
        return Evidence(
            name=self.profile.name,
            limit=self.limit,
            control=self.control,
            patched=self.patched,
            fresh=self.fresh,
            held=tuple(self.held),
            control_held=tuple(self.control_held),
            alone=asked,
            unasked=unasked,
            differ_alone=differ,
            slept=self.elastic.done.slept,
            counts=dict(self.elastic.done.counts),
            slots_left=left,
        )


def soak(options: Options, say: Say) -> Report:
    """Runs it. Raises CheckFailed when a server dies, hangs, or answers what it must not."""
    begin = time.monotonic()
    deadline = begin + options.minutes * 60 * _FOR_ROUNDS
    options.folder.mkdir(parents=True, exist_ok=True)
    made = profiles(options.device, options.folder, options.model)
    chosen = [profile for profile in made if not options.only or profile.name in options.only]
    with contextlib.ExitStack() as stack:
        courses = [_Course(options, profile, stack, say) for profile in chosen]
        say(f"started after {time.monotonic() - begin:.0f} s")
        _rounds(courses, deadline, say)
        results = [course.alone(begin + options.minutes * 60 * _AT_LAST) for course in courses]
    all_ = tuple(course.evidence(*result) for course, result in zip(courses, results, strict=True))
    problems = [f"{evidence.name}: {text}" for evidence in all_ for text in verdict.problems(evidence)]
    problems += [
        f"{evidence.name}: too few readings to tell whether anything leaks"
        for evidence in all_
        if options.minutes >= _SOAK_MINUTES and not verdict.grown(evidence.held, evidence.control_held)
    ]
    return Report(
        seed=options.seed,
        seconds=time.monotonic() - begin,
        rounds=sum(course.rounds for course in courses),
        evidence=all_,
        problems=(*problems, *verdict.provoked(all_)),
    )


def _rounds(courses: Sequence[_Course], deadline: float, say: Say) -> None:
    """In turn, until the time is over; each profile has at least one."""
    shown = time.monotonic()
    while True:
        for course in courses:
            if time.monotonic() > deadline and course.rounds:
                continue
            course.round()
        if time.monotonic() > deadline:
            return
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            say(
                "; ".join(
                    f"{c.profile.name}: {c.patched.answers} answers, {len(c.patched.mismatches)} differ "
                    f"(stock {len(c.control.mismatches)} of {c.control.answers}), {c.patched.refusals} refused"
                    for c in courses
                )
            )
