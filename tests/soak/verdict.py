"""What a soak has shown: counts, and whether they are good. Nothing here talks to a server."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.soak.schedule import Prompt
from tests.soak.sides import Answered, Held

MIB = 2**20
# How far below chance a difference between two mismatch rates must be to be called one.
CHANCE = 0.01
RSS_SLACK = 8 * MIB
MAPS_SLACK = 64
FILES_SLACK = 16
READINGS = 4  # of what a server holds, at least, to say whether it grows


@dataclass(slots=True)
class Tally:
    """Answers of one server under load, against the same prompts alone on the stock one."""

    answers: int = 0
    tokens: int = 0
    mismatches: list[Prompt] = field(default_factory=list)
    dropped: int = 0
    refusals: int = 0
    refused: list[Prompt] = field(default_factory=list)
    texts: dict[str, int] = field(default_factory=dict)

    def add(self, answer: Answered, expected: Answered) -> None:
        self.refusals += len(answer.refusals)
        for text in answer.refusals:
            self.texts[text] = self.texts.get(text, 0) + 1
        if answer.refused:
            self.refused.append(answer.request.prompt)
            return
        self.answers += 1
        self.tokens += len(answer.tokens)
        self.dropped += not answer.whole
        wanted = expected.tokens if answer.whole else expected.tokens[: len(answer.tokens)]
        if answer.tokens != wanted:
            self.mismatches.append(answer.request.prompt)

    @property
    def rate(self) -> float:
        return len(self.mismatches) / self.answers if self.answers else 0.0


def chance(few: int, of: int, many: int, among: int) -> float:
    """Fisher's exact test, one-sided: how probable it is that at least `many` of `few + many` mismatches fall on the
    second of two servers, if both are alike. 1.0 without any."""
    total, hits = of + among, few + many
    if hits == 0 or among == 0 or of == 0:
        return 1.0
    ways = math.comb(total, hits)
    return (
        sum(math.comb(among, k) * math.comb(of, hits - k) for k in range(many, min(hits, among) + 1)) / ways
    )


def growth(values: Sequence[float]) -> int:
    """How much the last third lies over the first, by medians; the first value, of a server that has just
    begun, is left out. Of less than `READINGS` nothing can be said: raises ValueError."""
    if len(values) < READINGS:
        raise ValueError(f"{len(values)} readings, at least {READINGS} are needed")
    later = values[1:]
    third = len(later) // 3
    return round(statistics.median(later[-third:]) - statistics.median(later[:third]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Grown:
    """How much one thing that a server holds grew, and how much stock's did `per` as many answers: the patched
    server plays twice as many rounds as stock, and a server's caches and heap grow with what it answers."""

    what: str
    ours: int
    stock: int
    slack: int
    per: float

    @property
    def allowed(self) -> int:
        return round(max(0, self.stock) * max(1.0, self.per)) + self.slack


def grown(held: Sequence[Held], control: Sequence[Held]) -> tuple[Grown, ...]:
    """What is compared with stock's. None where either has too few readings."""
    if min(len(held), len(control)) < READINGS:
        return ()
    answers = growth([one.answers for one in held]), growth([one.answers for one in control])
    return tuple(
        Grown(
            what=what,
            ours=growth([getattr(one, what) for one in held]),
            stock=growth([getattr(one, what) for one in control]),
            slack=slack,
            per=answers[0] / max(1, answers[1]),
        )
        for what, slack in (("rss", RSS_SLACK), ("maps", MAPS_SLACK), ("files", FILES_SLACK))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All of one profile. `fresh` and `held`: after start, and in the course of time, each with nothing in
    any slot. `alone`: prompts asked alone on the patched server, and those of them whose tokens or
    log-probabilities differed. `unasked`: those that differed under load, or were refused, and for which no
    time was left. `slots_left`: in the ledger after the servers' end."""

    name: str
    limit: int
    control: Tally
    patched: Tally
    fresh: Held
    held: tuple[Held, ...]
    control_held: tuple[Held, ...]
    alone: int
    unasked: int
    differ_alone: tuple[Prompt, ...]
    slept: int
    counts: dict[str, int]
    slots_left: int


def problems(evidence: Evidence) -> list[str]:
    """What is not as it must be; empty when all is."""
    found: list[str] = []
    control, patched = evidence.control, evidence.patched
    if not control.answers or not patched.answers or not evidence.alone:
        found.append(
            f"too little was asked: {control.answers} answers of stock, {patched.answers} of patched, "
            f"{evidence.alone} alone"
        )
    odds = chance(len(control.mismatches), control.answers, len(patched.mismatches), patched.answers)
    if patched.rate > control.rate and odds < CHANCE:
        found.append(
            f"{len(patched.mismatches)} of {patched.answers} answers differ, of stock's "
            f"{len(control.mismatches)} of {control.answers}: by chance with probability {odds:.2g}"
        )
    if evidence.differ_alone:
        found.append(f"{len(evidence.differ_alone)} answers differ even alone: {evidence.differ_alone[:3]}")
    if evidence.unasked:
        found.append(f"no time was left to ask {evidence.unasked} prompts alone")
    nameless = [text for text in patched.texts if "limit" not in text.lower()]
    if nameless:
        found.append(f"a refusal does not name the limit: {nameless[0]!r}")
    if control.refusals:
        found.append(
            f"the stock server refused {control.refusals} times: the schedule is not what it should be"
        )
    found += _leaks(evidence)
    return found


def _leaks(evidence: Evidence) -> list[str]:
    found = []
    kv = [held.kinds[0] for held in evidence.held]
    if any(kv):
        found.append(f"KV memory is left after erasing and trimming: up to {max(kv)} bytes")
    for held in evidence.held:
        if held.kinds[1:] != evidence.fresh.kinds[1:]:
            found.append(
                f"weights and compute buffers took {evidence.fresh.kinds[1:]}, later {held.kinds[1:]} bytes"
            )
            break
    hosts = [held.host for held in evidence.held]
    if any(host > evidence.limit for host in hosts):
        found.append(
            f"{max(hosts)} bytes are kept for sleeping, more than ever were mapped ({evidence.limit})"
        )
    claims = [held.claim for held in evidence.held]
    if any(claim > evidence.fresh.claim for claim in claims):
        found.append(
            f"{max(claims)} bytes are charged after erasing and trimming, {evidence.fresh.claim} at start"
        )
    for one in grown(evidence.held, evidence.control_held):
        if one.ours > one.allowed:
            found.append(
                f"{one.what} grew by {one.ours}, allowed: {one.allowed} (stock grew by {one.stock}, here are "
                f"{one.per:.2f} times the answers, and {one.slack})"
            )
    if evidence.slots_left:
        found.append(f"{evidence.slots_left} slots are left in the ledger after the server's end")
    return found


def provoked(all_: Sequence[Evidence]) -> list[str]:
    """What a soak must have done at least once to have shown anything."""
    found = []
    for action in ("trim", "sleep", "wake"):
        if not any(evidence.counts.get(action) for evidence in all_):
            found.append(f"nothing was ever told to {action}")
    if not any(evidence.slept for evidence in all_):
        found.append("no sleep gave anything back")
    if not any(evidence.patched.refusals for evidence in all_):
        found.append("the limit never refused anything: it was not tight")
    return found
