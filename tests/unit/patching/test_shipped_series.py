"""The series that kvpatch ships are well-formed, whatever source is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch.patching import load_series

PATCHES = Path(__file__).resolve().parents[3] / "patches"
SERIES = sorted(file.parent for file in PATCHES.rglob("series"))


def test_there_are_some() -> None:
    assert SERIES, f"no series file below {PATCHES}"


@pytest.mark.parametrize("directory", SERIES, ids=lambda path: str(path.relative_to(PATCHES)))
def test_loads(directory: Path) -> None:
    series = load_series(directory)
    assert series.patches
    for patch in series.patches:
        assert patch.hooks
        assert all(hunk.added for file in patch.files for hunk in file.hunks)


def test_no_stray_patch_files() -> None:
    """Every patch file below patches/ is in a directory that has a series."""
    assert {file.parent for file in PATCHES.rglob("*.patch")} <= set(SERIES)
