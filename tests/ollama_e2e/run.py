"""The course of a run: stock's answers, then the parts, each with a server of its own."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvpatch.hashing import of_value
from kvpatch.smoke.report import CheckFailed
from tests.ollama_e2e import identity, keeping, kills, service, sides, traffic, verdict, watch
from tests.ollama_e2e.questions import questions
from tests.ollama_e2e.reference import reference
from tests.ollama_e2e.setting import Options, Say, Setting
from tests.ollama_e2e.traffic import Manners
from tests.ollama_e2e.verdict import Evidence
from tests.ollama_e2e.zoo import zoo

_EACH = 12  # questions of a model
_SLACK = 1.02  # of the limit, over what any two models take that are allocated in full
_RUDE_SHARE = 0.5  # of the minutes
_PLACES = 3  # models that are awake at once at least, where stock fits two


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    seed: int
    seconds: float
    limit: int
    sizes: Mapping[str, int]
    evidence: tuple[Evidence, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(f"{one.name}: {text}" for one in self.evidence for text in one.problems)


def run(options: Options, say: Say) -> Report:
    """Runs it. What a server does that it must not is in the report, but for what leaves nothing to go on with."""
    begin = time.monotonic()
    options.folder.mkdir(parents=True, exist_ok=True)
    setting = _prepare(options, say)
    parts: dict[str, Callable[[], Evidence]] = {
        "traffic": lambda: _traffic(setting, "traffic", traffic.PLAIN, options.minutes * 60),
        "rude": lambda: _traffic(setting, "rude", traffic.RUDE, options.minutes * 60 * _RUDE_SHARE),
        "keeping": lambda: keeping.check(setting),
        "kills": lambda: kills.check(setting),
        "service": lambda: service.check(setting),
        "identity": lambda: identity.check(setting),
    }
    evidence = []
    for name in options.parts:
        say(f"{name}: begins")
        try:
            evidence.append(parts[name]())
        except CheckFailed as failure:
            tails = [f"last lines of {log}:\n{tail}" for log, tail in failure.logs.items()]
            evidence.append(Evidence(name=name, problems=("\n".join([failure.detail, *tails]),)))
    return Report(
        seed=options.seed,
        seconds=time.monotonic() - begin,
        limit=setting.limit,
        sizes=setting.wanted.sizes,
        evidence=tuple(evidence),
    )


def _prepare(options: Options, say: Say) -> Setting:
    members = zoo(options.folder / "models", options.seed)
    # Other models in the same folder have a store, and answers, of their own.
    made = of_value([member.model.sha256 for member in members])[:12]
    options = dataclasses.replace(options, folder=options.folder / f"zoo-{made}")
    options.folder.mkdir(exist_ok=True)
    asked = questions(random.Random(f"{options.seed} questions"), members, _EACH)
    wanted = reference(
        options.stock, options.folder, members, asked, random.Random(f"{options.seed} order"), say
    )
    sizes = wanted.sizes_of(members)
    limit = int(sum(sizes[:2]) * _SLACK)
    say(
        f"{len(wanted.answers)} questions, {len(wanted.unstable)} more that stock breaks off or answers "
        f"in two ways; models take {sizes[-1]} to {sizes[0]} bytes in stock, limit {limit}"
    )
    # The claim of the run, that stock would fit two: any two, and no three.
    if limit >= sum(sizes[-3:]):
        raise CheckFailed(f"three models would fit the limit in stock: {sizes}, limit {limit}")
    if not wanted.answers:
        raise CheckFailed("stock answers no question in one way only")
    return Setting(options=options, members=members, wanted=wanted, limit=limit, say=say)


def _traffic(setting: Setting, name: str, manners: Manners, seconds: float) -> Evidence:
    options = setting.options
    asked = tuple(setting.wanted.answers)
    with sides.start(options.patched, options.folder, name, setting.members, setting.elastic()) as side:
        watched = watch.Watch(side, setting.limit)
        with watched.watching() as seen:
            pinned = [question for question in asked if question.model == traffic.PINNED]
            # A client that hangs up must not end the load of the one that is never to be unloaded.
            first = traffic.warm(side, pinned, keep_alive=-1) if manners is not traffic.PLAIN else ()
            done = traffic.play(
                side, asked, setting.rng(name), seconds=seconds, manners=manners, say=setting.say
            )
            still = traffic.warm(side, asked)
        log = side.server.log_text()
        started = watch.children_logged(log, side.names)
        problems = []
        if children := sorted(seen.born.keys() - {member.name for member in setting.members}):
            problems.append(f"children for unknown models: {children}")
    found = verdict.tally((*first, *done.outcomes, *still), setting.wanted.answers)
    counts = watch.events(log)
    problems += verdict.answered(found, setting.wanted.answers)
    problems += verdict.elastic(counts, seen, setting.limit)
    problems += done.errors
    if manners is traffic.PLAIN:
        problems += verdict.reloaded(started, seen)
        if counts["unload"]:
            problems.append(f"{counts['unload']} models were unloaded though they could sleep")
        if seen.awake < _PLACES:
            problems.append(f"{seen.awake} models were awake at once at most, stock fits 2")
    else:
        pinned_starts = {traffic.PINNED: started.get(traffic.PINNED, 0)}
        problems += verdict.reloaded(pinned_starts, watch.Seen())
        if not found.dropped or not done.stops:
            problems.append(f"{found.dropped} clients hung up, {done.stops} models were stopped")
    problems += sides.left_behind(side.instance, frozenset(seen.files))
    return Evidence(
        name=name,
        problems=tuple(problems),
        tally=found,
        events=counts,
        started=started,
        seen=seen,
        figures={"stops": done.stops},
    )
