"""How a llama.cpp relates to what a release pins, and what decides a workspace and a series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvpatch import paths, pins, plan
from kvpatch.errors import SourceError
from kvpatch.sources import Resolved

MakePlan = Callable[..., plan.Plan]


@pytest.fixture(scope="module")
def release() -> pins.OllamaRelease:
    return pins.load(paths.data_dir() / "patches" / "pins.toml").release("v0.32.15")


def llama_cpp(**changes: object) -> Resolved:
    base = Resolved(
        upstream="llama.cpp",
        kind="git",
        location="https://example/llama.cpp.git",
        ref="b10488",
        commit="1" * 40,
        key="k",
        date="2026-08-18",
        verified=False,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def status(
    found: Resolved, release: pins.OllamaRelease, *, allow: bool = False
) -> tuple[str, tuple[str, ...]]:
    return plan._pin_status(release, found, plan.Request(out=Path("out"), allow_pin_mismatch=allow))


def test_the_pinned_commit_needs_no_word(release: pins.OllamaRelease) -> None:
    assert status(llama_cpp(verified=True), release) == ("pinned", ())


def test_a_tag_without_a_recorded_commit_is_taken_on_its_word_and_said_so(
    release: pins.OllamaRelease,
) -> None:
    found, warnings = status(llama_cpp(), release)
    assert found == "tag"
    assert "1" * 40 in warnings[0]
    assert "--lock" in warnings[0]


def test_one_verified_with_the_release_is_a_warning(release: pins.OllamaRelease) -> None:
    found, warnings = status(
        llama_cpp(kind="sdist", ref="0.3.35", commit="4df29be4f", verified=True), release
    )
    assert found == "verified"
    assert "b10488" in warnings[0]


@pytest.mark.parametrize(
    "changes", [{"ref": "b1"}, {"kind": "path", "commit": ""}, {"kind": "sdist", "commit": "4df29be40"}]
)
def test_any_other_is_refused_until_it_is_allowed(
    release: pins.OllamaRelease, changes: dict[str, object]
) -> None:
    with pytest.raises(SourceError, match="neither b10488") as caught:
        status(llama_cpp(**changes), release)
    assert caught.value.hint is not None
    assert "--allow-pin-mismatch" in caught.value.hint
    found, warnings = status(llama_cpp(**changes), release, allow=True)
    assert found == "mismatch"
    assert warnings


def test_an_ollama_that_does_not_tell_its_commit_is_refused_until_it_is_allowed(
    release: pins.OllamaRelease,
) -> None:
    request = plan.Request(out=Path("out"))
    known = llama_cpp(upstream="ollama", ref=release.version, commit=release.commit, verified=True)
    assert plan._ollama_pin(release, known, request) == ()
    folder = replace(known, kind="path", commit="", verified=False)
    with pytest.raises(SourceError, match="does not tell its commit") as caught:
        plan._ollama_pin(release, folder, request)
    assert caught.value.exit_code == 4
    (warning,) = plan._ollama_pin(release, folder, replace(request, allow_pin_mismatch=True))
    assert "taken as it is" in warning


def test_a_workspace_is_named_by_sources_and_not_by_patches(make_plan: MakePlan) -> None:
    base = make_plan()
    assert make_plan(stock=True).workspace == base.workspace
    assert make_plan(out=Path("/elsewhere")).workspace == base.workspace
    other = make_plan(llama_cpp=replace(base.llama_cpp, key="another"))
    assert other.workspace != base.workspace
    assert other.workspace.parent == base.workspace.parent


def test_the_label_names_series_and_a_llama_cpp_that_is_not_the_pinned_one(make_plan: MakePlan) -> None:
    base = make_plan()
    assert base.series_id in base.label
    assert "4df29be4f" in make_plan(pin_status="verified").label
    assert make_plan(stock=True).label == base.name
