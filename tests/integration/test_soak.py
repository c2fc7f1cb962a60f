"""A minute of the soak (`python -m tests.soak` runs it for longer), and proof that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch import smoke
from kvpatch.smoke.report import CheckFailed
from tests.soak.__main__ import main
from tests.soak.run import Options, soak

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]


def test_a_minute(stock: smoke.Install, patched: smoke.Install, tmp_path: Path) -> None:
    # Its output, with the seed, is shown when it fails.
    words = ["--stock", stock.root, "--patched", patched.root, "--minutes", 1, "--out", tmp_path]
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "soak.json").is_file()


def test_a_page_too_few_is_noticed(stock: smoke.Install, patched: smoke.Install, tmp_path: Path) -> None:
    """Without flash attention, where the CPU reads masked cells: the server dies of it, or answers are others."""
    options = Options(
        stock=stock,
        patched=patched,
        folder=tmp_path,
        seed=1,
        minutes=0.2,
        env={"KVCACHED_TEST_UNDERCOMMIT_PAGES": "1"},
        only=("split-sliding-window",),
    )
    found: tuple[str, ...]
    try:
        found = soak(options, lambda text: None).problems
    except CheckFailed as death:
        found = (death.detail,)
    assert any(sign in text for text in found for sign in ("differ", "SIGSEGV", "SIGBUS")), found
