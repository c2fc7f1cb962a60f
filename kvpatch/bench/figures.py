"""Figures of a benchmark: medians with their spread, ratios, bounds; as a value and as text."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpatch.errors import VerifyError

SCHEMA = "kvpatch.bench/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Of repeated measurements: median, ends of the middle half (of one or two values: least and most), count."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Raises ValueError without values."""
        if not values:
            raise ValueError("nothing was measured")
        low, high = min(values), max(values)
        if len(values) > 2:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=statistics.median(values), low=low, high=high, n=len(values))

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.n}


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -int(-len(ranked) * percent // 100) - 1))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure of every side that has it. `ratio`: each other side's median over the stock side's."""

    section: str
    name: str
    unit: str
    sides: Mapping[str, Summary]

    @property
    def ratio(self) -> dict[str, float]:
        stock = self.sides.get("stock")
        if stock is None or not stock.median:
            return {}
        return {name: s.median / stock.median for name, s in self.sides.items() if name != "stock"}

    def to_json(self) -> dict[str, Any]:
        return {
            "section": self.section,
            "name": self.name,
            "unit": self.unit,
            "sides": {name: summary.to_json() for name, summary in self.sides.items()},
            "ratio": self.ratio,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What a figure may be: at least or at most `limit`. `of` says what the limit is made of."""

    name: str
    value: float
    limit: float
    unit: str
    least: bool = False
    of: str = ""

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "unit": self.unit,
            "kind": "at_least" if self.least else "at_most",
            "of": self.of,
            "holds": self.holds,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Values to be drawn: one box a series."""

    title: str
    unit: str
    series: Mapping[str, Sequence[float]]


@dataclass(kw_only=True, slots=True)
class Report:
    """What one benchmark found. `facts`: what was measured, on what; `notes`: what a reader must know besides."""

    kind: str
    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)

    def row(
        self, section: str, name: str, unit: str, values: Mapping[str, Sequence[float]], *, draw: bool = False
    ) -> Row | None:
        """Add a figure of the sides that have values; None when none has."""
        sides = {side: Summary.of(v) for side, v in values.items() if v}
        if not sides:
            return None
        made = Row(section=section, name=name, unit=unit, sides=sides)
        self.rows.append(made)
        if draw:
            self.charts.append(Chart(title=f"{section}: {name}", unit=unit, series=dict(values)))
        return made

    def at_most(self, name: str, value: float, limit: float, unit: str, of: str = "") -> None:
        self.bounds.append(Bound(name=name, value=value, limit=limit, unit=unit, of=of))

    def at_least(self, name: str, value: float, limit: float, unit: str, of: str = "") -> None:
        self.bounds.append(Bound(name=name, value=value, limit=limit, unit=unit, least=True, of=of))

    @property
    def missed(self) -> list[Bound]:
        return [bound for bound in self.bounds if not bound.holds]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "facts": self.facts,
            "rows": [row.to_json() for row in self.rows],
            "bounds": [bound.to_json() for bound in self.bounds],
            "bounds_missed": len(self.missed),
            "notes": self.notes,
        }

    def write(self, out: Path) -> list[Path]:
        """KIND.json with the figures, KIND-raw.json with every value that a chart is drawn of."""
        out.mkdir(parents=True, exist_ok=True)
        whole = out / f"{self.kind}.json"
        whole.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        raw = out / f"{self.kind}-raw.json"
        series = [{"title": c.title, "unit": c.unit, "series": dict(c.series)} for c in self.charts]
        raw.write_text(json.dumps(series) + "\n", encoding="utf-8")
        return [whole, raw]

    def require(self) -> None:
        """Raise VerifyError that names each bound missed. Bounds that were not measured are missed too."""
        if not self.bounds:
            raise VerifyError(f"bench {self.kind} measured nothing that has a bound")
        if self.missed:
            raise VerifyError(
                f"bench {self.kind}: {len(self.missed)} of {len(self.bounds)} bounds missed\n"
                + "\n".join(f"{b.name}: {bound_text(b)}" for b in self.missed),
                hint="the figures are in the JSON; run again on a machine that does nothing else",
                data={"report": self.to_json()},
            )


def bound_text(bound: Bound) -> str:
    """ "3.1 ms, at most 2.0 ms"."""
    word = "at least" if bound.least else "at most"
    return f"{number(bound.value, bound.unit)}, {word} {number(bound.limit, bound.unit)}"


def number(value: float, unit: str) -> str:
    """A figure as a person reads it: three or four digits that count, bytes in MiB."""
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    if unit == "ratio":
        return f"{value:.4f}"
    size = abs(value)
    digits = 0 if size >= 1000 or value == int(value) else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()
