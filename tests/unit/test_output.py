"""The output folder, its manifest, and `kvpatch verify`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpatch import manifest
from kvpatch.errors import CompileError, UsageError, VerifyError
from kvpatch.plan import Plan
from kvpatch.stages import output


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    root = tmp_path / "staging"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "libx.so.1").write_bytes(b"library")
    (root / "bin" / "libx.so").symlink_to("libx.so.1")
    return root


@pytest.fixture
def built(staging: Path, make_plan: Callable[..., Plan]) -> Path:
    plan = make_plan()
    values = {
        "fetch": {"llama.cpp": {"upstream_commit": "u"}},
        "apply": {"llama.cpp": {"commit": "c"}},
        "generate": {},
        "compile": {"artifacts": output.describe(staging)},
        "smoke": {"report": {"ok": True}},
    }
    output.replace(staging, plan.out)
    manifest.write(manifest.build(plan, values, {"flags": []}), plan.out)
    return plan.out


def test_a_new_build_replaces_the_old_one_whole(built: Path, staging: Path) -> None:
    (staging / "bin" / "libx.so").unlink()
    (staging / "bin" / "new").write_bytes(b"")
    output.check_replaceable(built)
    output.replace(staging, built)
    assert sorted(p.name for p in (built / "bin").iterdir()) == ["libx.so.1", "new"]
    assert [p.name for p in built.parent.iterdir() if p.name.startswith(f".{built.name}")] == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="would be lost"):
        output.check_replaceable(tmp_path / "photos")
    with pytest.raises(UsageError, match="is not a folder"):
        output.check_replaceable(tmp_path / "photos" / "cat.jpg")
    (tmp_path / "empty").mkdir()
    output.check_replaceable(tmp_path / "empty")
    output.check_replaceable(tmp_path / "absent")


def test_a_file_that_was_put_into_a_build_is_not_lost(built: Path, staging: Path) -> None:
    (built / "bin" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"1 files .* bin/notes\.txt"):
        output.replace(staging, built)
    assert (built / "bin" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_failed_copy_leaves_the_old_build(
    built: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.shutil, "copytree", full)
    with pytest.raises(CompileError, match="No space left"):
        output.replace(staging, built)
    assert manifest.verify(built).checked == 2


def test_unchanged_sees_size_time_and_links(staging: Path) -> None:
    rows = output.describe(staging)
    assert output.unchanged(staging, rows)
    os.utime(staging / "bin" / "libx.so.1", ns=(0, 0))
    assert not output.unchanged(staging, rows)
    rows = output.describe(staging)
    (staging / "bin" / "libx.so").unlink()
    assert not output.unchanged(staging, rows)


def test_verify_accepts_what_was_built(built: Path) -> None:
    result = manifest.verify(built)
    assert result.checked == 2
    assert result.smoked is True


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda out: (out / "bin" / "libx.so.1").write_bytes(b"librarY"), "bin/libx.so.1: changed"),
        (lambda out: (out / "bin" / "libx.so.1").unlink(), "bin/libx.so.1: missing"),
        (lambda out: (out / "bin" / "extra").write_bytes(b""), "bin/extra: not in the manifest"),
        (
            lambda out: ((out / "bin" / "libx.so").unlink(), (out / "bin" / "libx.so").symlink_to("y")),
            "is not a link to",
        ),
    ],
)
def test_verify_names_each_difference(built: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(built)
    with pytest.raises(VerifyError, match=expected) as caught:
        manifest.verify(built)
    assert caught.value.exit_code == 9


def test_verify_needs_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"has no kvpatch\.json"):
        manifest.verify(tmp_path)
    (tmp_path / "kvpatch.json").write_text("{", encoding="utf-8")
    with pytest.raises(VerifyError, match="cannot be read"):
        manifest.verify(tmp_path)
    (tmp_path / "kvpatch.json").write_text('{"schema": 99}', encoding="utf-8")
    with pytest.raises(VerifyError, match="not a manifest"):
        manifest.verify(tmp_path)
    (tmp_path / "kvpatch.json").write_text('{"schema": 1, "artifacts": [{}]}', encoding="utf-8")
    with pytest.raises(VerifyError, match="is damaged"):
        manifest.verify(tmp_path)
