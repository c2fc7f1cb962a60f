"""The llama.cpp series on every date that pins.toml names: applied hook by hook; where claimed, built and smoked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpatch import manifest, paths, pins
from kvpatch.patching import Verdict, load_series
from tests.integration.conftest import Kvpatch

DATA = paths.data_dir()
KNOWN = pins.load(DATA / "patches" / "pins.toml")
SERIES = load_series(DATA / "patches" / "llama.cpp")
CLAIMED = [sdist for sdist in KNOWN.sdists if sdist.status == "built"]


def held(sdist: pins.Sdist, cache: Path) -> Path | None:
    """The source distribution's file, where it was put for the tests or fetched before."""
    name = f"llama_cpp_python-{sdist.version}.tar.gz"
    folders = [cache / "sources" / "sdists"]
    if (given := os.environ.get("KVPATCH_SDISTS")) is not None:
        folders.insert(0, Path(given))
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def test_enough_dates_are_claimed() -> None:
    assert len(CLAIMED) >= 6
    assert CLAIMED[0].date < "2026-04-30"
    assert CLAIMED[-1].date == max(sdist.date for sdist in KNOWN.sdists)


def test_every_purpose_has_a_patch_for_every_date() -> None:
    purposes = {patch.stem for patch in SERIES.patches}
    for date in [sdist.date for sdist in KNOWN.sdists] + [build.date for build in KNOWN.llama_cpp]:
        missing = purposes - {patch.stem for patch in SERIES.select(date)}
        # Until April upstream listed the files it compiles; the compressor's state came in July, with its model;
        # the server hands its batches to drafts since the end of May, and decoded images for them until mid-June.
        expected = {"0018-sources"} if date >= "2026-04-26" else set()
        expected |= {"0006-compressor-state"} if date < "2026-07-05" else set()
        expected |= {"0019-server-draft"} if date < "2026-05-31" else set()
        expected |= set() if "2026-05-31" <= date < "2026-06-13" else {"0022-server-image-draft"}
        # Checkpoints are common's since the end of May, were the server's own before, and unchecked until April.
        expected |= {"0023-server-checkpoint"} if date < "2026-05-31" else set()
        expected |= set() if "2026-04-26" <= date < "2026-05-31" else {"0024-server-checkpoint-made"}
        expected |= {"0025-server-draft-decode"} if date >= "2026-05-31" else set()  # 0019 from then on
        assert missing == expected, date


@pytest.mark.parametrize("sdist", KNOWN.sdists, ids=lambda sdist: sdist.version)
def test_the_series_applies_hook_by_hook(
    sdist: pins.Sdist, kvpatch: Kvpatch, shared_cache: Path, tmp_path: Path
) -> None:
    file = held(sdist, shared_cache)
    if file is None:
        pytest.skip(
            f"llama-cpp-python {sdist.version} is not in the cache and KVPATCH_SDISTS names no folder with it"
        )
    applies_hook_by_hook(sdist, kvpatch, f"sdist:{file}", tmp_path / "out")


@pytest.mark.build
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sdist", CLAIMED, ids=lambda sdist: sdist.version)
def test_the_series_applies_to_a_claimed_date(
    sdist: pins.Sdist, kvpatch: Kvpatch, shared_cache: Path, tmp_path: Path
) -> None:
    if held(sdist, shared_cache) is not None:
        pytest.skip("its file is at hand, so the test before did this")
    applies_hook_by_hook(sdist, kvpatch, "sdist", tmp_path / "out")


def applies_hook_by_hook(sdist: pins.Sdist, kvpatch: Kvpatch, source: str, out: Path) -> None:
    done = kvpatch("apply", "--llama-cpp", sdist.version, "--llama-cpp-source", source, "--out", out)
    report = done["data"]["values"]["apply"]["llama.cpp"]["report"]
    assert report["ok"]
    assert [patch["name"] for patch in report["patches"]] == [
        patch.file.name for patch in SERIES.select(sdist.date)
    ]
    found = {hunk["verdict"] for patch in report["patches"] for hunk in patch["hunks"]}
    # Found as they are: nothing was merged, so a variant says exactly what it puts where.
    assert found <= {Verdict.EXACT.value, Verdict.MOVED.value}


@pytest.mark.dates
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("sdist", CLAIMED, ids=lambda sdist: sdist.version)
def test_a_claimed_date_is_built_and_smoked(
    sdist: pins.Sdist, kvpatch: Kvpatch, shared_cache: Path, tmp_path: Path
) -> None:
    file = held(sdist, shared_cache)
    source = f"sdist:{file}" if file is not None else "sdist"
    done = kvpatch(
        "build", "--llama-cpp", sdist.version, "--llama-cpp-source", source, "--out", tmp_path / "out"
    )
    assert done["data"]["plan"]["sources"][0]["commit"].startswith(sdist.commit)
    report = manifest.read(tmp_path / "out")["smoke"]
    assert report["ok"]
    assert len(report["checks"]) > 40
