"""Smoke can fail: a stock server that poses as a patched one does not pass. What passes is in test_build_llama.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch import smoke

pytestmark = [pytest.mark.build, pytest.mark.timeout(3600)]


def test_a_stock_server_that_poses_as_patched_fails(stock: smoke.Install, tmp_path: Path) -> None:
    """The same checks on binaries without the feature: answers are equal, yet the run must fail."""
    pose = tmp_path / "pose" / "bin"
    pose.mkdir(parents=True)
    for path in stock.llama_server.parent.iterdir():
        (pose / path.name).symlink_to(path)
    (pose / "libkvcached.so").write_bytes(b"")
    report = smoke.run(smoke.Install.detect(pose.parent), workdir=tmp_path / "work")
    failed = {check.name.split(":")[0] for check in report.failed}
    assert {"off is stock", "memory at start", "memory as the kernel sees it", "smoke can fail"} <= failed
    assert "tokens equal" not in failed
