"""patches/pins.toml and what is read from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpatch import paths, pins
from kvpatch.errors import KvpatchError, SourceError, UsageError


@pytest.fixture(scope="module")
def known() -> pins.Pins:
    return pins.load(paths.data_dir() / "patches" / "pins.toml")


def test_the_shipped_file_is_complete(known: pins.Pins) -> None:
    assert all(re.fullmatch(r"[0-9a-f]{40}", release.commit) for release in known.ollama)
    assert all(re.fullmatch(r"[0-9a-f]{64}", sdist.sha256) for sdist in known.sdists)
    assert {release.status for release in known.ollama} <= {"built", "listed"}
    assert known.release(known.default_ollama).status == "built"
    assert known.sdist().version == known.default_sdist
    versions = [release.version for release in known.ollama]
    assert versions == sorted(versions, key=pins.version_key)
    assert len(set(versions)) == len(versions)


def test_every_commit_verified_with_a_release_has_a_date(known: pins.Pins) -> None:
    for release in known.ollama:
        for commit in release.verified_with:
            assert known.llama_cpp_date(commit), f"{release.version}: {commit}"


def test_a_short_name_is_not_taken_for_a_commit(known: pins.Pins) -> None:
    assert known.llama_cpp_date("4df29be4f" + "0" * 31) == known.sdist().date
    assert known.llama_cpp_date("4") is None
    assert known.llama_cpp_date("") is None


def test_the_leading_v_may_be_left_out(known: pins.Pins) -> None:
    assert known.release("0.32.15") is known.release("v0.32.15")


def test_an_unknown_release_names_the_nearest(known: pins.Pins) -> None:
    with pytest.raises(SourceError, match=r"v9\.9\.9 is not a release") as caught:
        known.release("v9.9.9")
    assert caught.value.exit_code == 4
    assert caught.value.hint is not None
    assert "v0.32.15" in caught.value.hint


def test_an_unpinned_sdist_names_those_that_are(known: pins.Pins) -> None:
    with pytest.raises(UsageError) as caught:
        known.sdist("0.0.1")
    assert caught.value.hint is not None
    assert "0.3.35" in caught.value.hint


def test_nearest_looks_both_ways() -> None:
    versions = ["v0.1.0", "v0.2.0", "v0.3.0", "v0.4.0"]
    assert pins.nearest("v0.2.5", versions, 2) == ["v0.3.0", "v0.4.0"]
    assert pins.nearest("v9", versions, 2) == ["v0.3.0", "v0.4.0"]
    assert pins.nearest("not-a-version", versions, 2) == ["v0.3.0", "v0.4.0"]


@pytest.mark.parametrize("text", ["", "schema = 1\n", "schema = 7\n", "not toml ["])
def test_a_malformed_file_is_our_fault(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pins.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KvpatchError) as caught:
        pins.load(path)
    assert caught.value.exit_code == 70
