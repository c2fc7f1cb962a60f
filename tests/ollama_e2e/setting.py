"""What all parts of a run share."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvpatch.smoke.install import Install
from tests.ollama_e2e import sides
from tests.ollama_e2e.questions import Question
from tests.ollama_e2e.reference import Reference
from tests.ollama_e2e.zoo import Member

PARTS = ("traffic", "rude", "keeping", "kills", "service", "identity")
KILLS = ("kills", "service")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`parts`: names of PARTS. `minutes`: of traffic. `env`: further settings of the patched servers."""

    stock: Install
    patched: Install
    folder: Path
    seed: int
    minutes: float
    parts: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A run that is prepared. `limit`: bytes."""

    options: Options
    members: tuple[Member, ...]
    wanted: Reference
    limit: int
    say: Say

    def rng(self, what: str) -> random.Random:
        return random.Random(f"{self.options.seed} {what}")

    def elastic(self, **others: str) -> dict[str, str]:
        return {**sides.elastic_settings(self.limit, **others), **self.options.env}

    def question(self, model: str, number: int = 0, way: str = "") -> Question:
        """One of a model's that can be judged, and that is asked this way."""
        found = [q for q in self.wanted.answers if q.model == model and not q.cramped and way in ("", q.way)]
        return found[number % len(found)]
