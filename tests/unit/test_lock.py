"""The lock file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvpatch import lock
from kvpatch.errors import UsageError, VerifyError
from kvpatch.plan import Plan


def test_an_equal_plan_passes_wherever_it_builds(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    lock.write(make_plan(), tmp_path / "lock")
    lock.check(make_plan(out=tmp_path / "other", cache=tmp_path / "another"), tmp_path / "lock")


def test_every_difference_is_named(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    lock.write(plan, tmp_path / "lock")
    moved = make_plan(
        llama_cpp=replace(plan.llama_cpp, commit="0123456789"),
        tools=(replace(plan.tools[0], version="13.0"),),
    )
    with pytest.raises(VerifyError, match="2 differences") as caught:
        lock.check(moved, tmp_path / "lock")
    assert caught.value.exit_code == 9
    text = "\n".join(caught.value.data["differences"])
    assert "sources" in text
    assert "tools.cc: locked '12.0', planned '13.0'" in text


def test_locked_without_a_lock_file_is_a_usage_error(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(UsageError, match="there is no"):
        lock.check(make_plan(), tmp_path / "absent")
    (tmp_path / "lock").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read"):
        lock.check(make_plan(), tmp_path / "lock")
