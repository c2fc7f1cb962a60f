from __future__ import annotations

from datetime import date

import pytest
from packaging.version import Version

from kvpatch.patching.ranges import RangeError, parse_range, parse_target


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (">=0.30.0", ["v0.30.0", "0.31.2"], ["0.29.9", "0.30.0-rc1"]),
        (">=0.30.0,<0.32.0", ["0.30.0", "0.31.9", "0.32.0-rc0"], ["0.32.0", "0.29"]),
        ("==0.32.15", ["v0.32.15"], ["0.32.14"]),
        (">0.1,<=0.3,!=0.2", ["0.1.1", "0.3"], ["0.1", "0.2", "0.3.1"]),
        (">=2026-08-01", ["2026-08-01", "2027-01-01"], ["2026-07-31"]),
        (">2026-08-01,<2026-08-03", ["2026-08-02"], ["2026-08-01", "2026-08-03"]),
        ("==2026-08-13", ["2026-08-13"], ["2026-08-14"]),
    ],
)
def test_matching(text: str, inside: list[str], outside: list[str]) -> None:
    span = parse_range(text)
    assert [t for t in inside if not span.matches(parse_target(t))] == []
    assert [t for t in outside if span.matches(parse_target(t))] == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a comparator"),
        ("0.30", "is not a comparator"),
        ("~=0.3", "is not a comparator"),
        (">=abc", "neither a version nor a day"),
        (">=2026-02-30", "not a day of the calendar"),
        (">=0.3,<2026-08-01", "mixes versions and days"),
        (">=2,<1", "nothing can satisfy"),
        (">1,<=1", "nothing can satisfy"),
        (">2026-08-01,<2026-08-02", "nothing can satisfy"),
        ("==1,!=1", "nothing can satisfy"),
    ],
)
def test_bad_ranges(text: str, why: str) -> None:
    with pytest.raises(RangeError, match=why):
        parse_range(text)


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        (">=1,<2", ">=2", False),
        (">=1,<=2", ">=2", True),
        (">=1", "<3", True),
        (">=1", "==1.5", False),  # exact beats a range
        ("==1.5", "==1.5", True),
        ("==1.5", "==1.6", False),
        ("<=2026-08-01", ">=2026-08-02", False),
        ("<2026-08-02", ">2026-08-01", False),  # days are discrete
        ("<=2026-08-01", ">=2026-08-01,!=2026-08-01", False),
        (">=1", ">=2026-08-01", False),
    ],
)
def test_overlap(a: str, b: str, overlap: bool) -> None:
    assert parse_range(a).overlaps(parse_range(b)) is overlap
    assert parse_range(b).overlaps(parse_range(a)) is overlap


def test_kinds_do_not_mix() -> None:
    with pytest.raises(RangeError, match="on a version"):
        parse_range(">=1").matches(date(2026, 8, 1))
    with pytest.raises(RangeError, match="on a date"):
        parse_range(">=2026-08-01").matches(Version("1"))
