"""Names of releases and commits."""

from __future__ import annotations

import pytest

from kvpatch.sources import Pin, Upstream
from kvpatch.sources.errors import PinMismatchError
from kvpatch.sources.names import check_commit, nearest, ordered, unknown_ref

TAGS = (
    "v0.1.0",
    "v0.9.6",
    "v0.12.11",
    "v0.24.0",
    "v0.30.0-rc1",
    "v0.30.0",
    "v0.32.14",
    "v0.32.15-rc0",
    "v0.32.15",
)
LLAMA = Upstream(name="llama.cpp", url="x")


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("v9.9.9", "v0.32.15"),
        ("0.32.15", "v0.32.15"),
        ("V0.32.14", "v0.32.14"),
        ("v0.31.0", "v0.32.14"),
        ("v0.32.15-rc1", "v0.32.15-rc0"),
        ("v0.12.1", "v0.12.11"),
        ("latest", "v0.32.15"),
        ("v0.0.1", "v0.1.0"),
    ],
)
def test_nearest(wanted: str, first: str) -> None:
    found = nearest(wanted, TAGS)
    assert found[0] == first or first in found[:2]
    assert len(found) <= 6
    assert len(set(found)) == len(found)
    if "rc" not in wanted:
        assert not any("rc" in name for name in found)


def test_nearest_builds() -> None:
    builds = [f"b{n}" for n in range(9000, 10490, 3)]
    assert set(nearest("b10001", builds)[:4]) >= {"b9999", "b10002"}
    assert nearest("x", []) == ()


def test_order() -> None:
    assert ordered(reversed(TAGS)) == TAGS


def test_nothing_exists() -> None:
    error = unknown_ref(LLAMA, "b1", (), "/some/mirror")
    assert "no tags at all" in str(error)
    assert "--llama-cpp-source" in (error.hint or "")


def test_commit_of_a_pin() -> None:
    commit = "4df29be4f4c3673f428170fda944a5b19f743bb8"
    assert check_commit(LLAMA, Pin(ref="b1", commit=commit.upper()), commit, "x")
    assert not check_commit(LLAMA, Pin(ref="b1"), commit, "x")
    with pytest.raises(PinMismatchError):
        check_commit(LLAMA, Pin(ref="b1", commit="4df29be40"), commit, "x")
