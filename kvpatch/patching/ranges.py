"""Ranges of upstream versions or commit dates that a patch is for.

A range is a comma separated list of comparators that must all hold: ``>=0.30.0,<0.32.0`` on versions, or
``>=2026-08-01`` on days; ``==0.32.15`` is exact. Versions are ordered as packaging.version orders them, a
plain total order: a pre-release comes before its release, and (unlike in PEP 440 specifiers) ``<0.31.0`` does
hold for 0.31.0rc1, so that ``<X`` and ``>=X`` leave no version without a patch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from packaging.version import InvalidVersion, Version

Target = Version | date
Kind = Literal["version", "date"]

_COMPARATOR = re.compile(r"(==|!=|>=|<=|>|<)\s*(\S+)")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class RangeError(ValueError):
    """The text is not a range, or one that nothing can satisfy."""


def parse_target(text: str) -> Target:
    """A version (a leading ``v`` is allowed) or a day written YYYY-MM-DD. Raises RangeError."""
    if _DAY.fullmatch(text):
        try:
            return date.fromisoformat(text)
        except ValueError as error:
            raise RangeError(f"{text!r} is not a day of the calendar") from error
    try:
        return Version(text)
    except InvalidVersion as error:
        raise RangeError(f"{text!r} is neither a version nor a day (YYYY-MM-DD)") from error


def kind_of(target: Target) -> Kind:
    return "date" if isinstance(target, date) else "version"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bound:
    value: Target
    inclusive: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """What targets a patch is for; build one with `parse_range`."""

    text: str
    kind: Kind
    exact: Target | None
    lower: _Bound | None
    upper: _Bound | None
    excluded: tuple[Target, ...]

    def matches(self, target: Target) -> bool:
        """Whether the target lies in the range. Raises RangeError when one is a version, the other a day."""
        if kind_of(target) != self.kind:
            raise RangeError(f"range {self.text!r} is on a {self.kind}, but the target {target} is not one")
        if target in self.excluded:
            return False
        return _above(target, self.lower) and _below(target, self.upper)

    def overlaps(self, other: Range) -> bool:
        """Whether some target lies in both. An exact range beats a wider one, so those two do not count."""
        if self.kind != other.kind or (self.exact is None) != (other.exact is None):
            return False
        return not _empty(
            _tighter(self.lower, other.lower, low=True),
            _tighter(self.upper, other.upper, low=False),
            (*self.excluded, *other.excluded),
        )


def parse_range(text: str) -> Range:
    """Parse comparators. Raises RangeError for bad syntax, mixed kinds, or a range that nothing can
    satisfy.
    """
    lower: _Bound | None = None
    upper: _Bound | None = None
    exact: Target | None = None
    excluded: list[Target] = []
    kinds: set[Kind] = set()
    for part in text.split(","):
        found = _COMPARATOR.fullmatch(part.strip())
        if found is None:
            raise RangeError(f"{part.strip()!r} is not a comparator such as >=0.30.0 or <2026-08-01")
        operator, value = found.group(1), parse_target(found.group(2))
        kinds.add(kind_of(value))
        if len(kinds) > 1:
            raise RangeError(f"{text!r} mixes versions and days")
        if operator == "!=":
            excluded.append(value)
            continue
        if operator == "==":
            exact = value
        if operator in ("==", ">=", ">"):
            lower = _tighter(lower, _bound(value, inclusive=operator != ">", step=1), low=True)
        if operator in ("==", "<=", "<"):
            upper = _tighter(upper, _bound(value, inclusive=operator != "<", step=-1), low=False)
    if _empty(lower, upper, tuple(excluded)):
        raise RangeError(f"nothing can satisfy {text!r}")
    return Range(text=text, kind=kinds.pop(), exact=exact, lower=lower, upper=upper, excluded=tuple(excluded))


def _bound(value: Target, *, inclusive: bool, step: int) -> _Bound:
    # Days are discrete: ">d" is ">=d+1", so that adjacent ranges are not seen as overlapping.
    if isinstance(value, date) and not inclusive:
        return _Bound(value=value + timedelta(days=step), inclusive=True)
    return _Bound(value=value, inclusive=inclusive)


def _less(a: Target, b: Target) -> bool:
    if isinstance(a, date) and isinstance(b, date):
        return a < b
    assert isinstance(a, Version)
    assert isinstance(b, Version)
    return a < b


def _above(target: Target, bound: _Bound | None) -> bool:
    return bound is None or _less(bound.value, target) or (bound.inclusive and target == bound.value)


def _below(target: Target, bound: _Bound | None) -> bool:
    return bound is None or _less(target, bound.value) or (bound.inclusive and target == bound.value)


def _tighter(a: _Bound | None, b: _Bound | None, *, low: bool) -> _Bound | None:
    if a is None or b is None:
        return a or b
    if a.value == b.value:
        return b if a.inclusive else a
    return a if _less(a.value, b.value) != low else b


def _empty(lower: _Bound | None, upper: _Bound | None, excluded: tuple[Target, ...]) -> bool:
    if lower is None or upper is None:
        return False
    if lower.value == upper.value:
        return not (lower.inclusive and upper.inclusive) or lower.value in excluded
    return _less(upper.value, lower.value)
