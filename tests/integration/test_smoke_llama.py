"""Smoke and demo on real builds. The folders of finished installs may be named in the environment; the stock server is
built when it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpatch import demo, smoke
from tests.integration.conftest import Kvpatch

pytestmark = [pytest.mark.build, pytest.mark.timeout(3600)]

LLAMA, OLLAMA, STOCK = (
    "KVPATCH_TEST_INSTALL_LLAMA",
    "KVPATCH_TEST_INSTALL_OLLAMA",
    "KVPATCH_TEST_INSTALL_STOCK",
)


def _install(variable: str) -> smoke.Install:
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} does not name an install to test")
    return smoke.Install.detect(Path(root))


@pytest.fixture
def stock(kvpatch: Kvpatch, shared_cache: Path) -> smoke.Install:
    if os.environ.get(STOCK):
        return _install(STOCK)
    # Where the demonstration builds it too, so that it is built once.
    out = shared_cache / "demo" / "stock"
    kvpatch("compile", "--llama-cpp", "sdist", "--llama-cpp-source", "sdist", "--stock", "--out", out)
    return smoke.Install.detect(out)


@pytest.mark.parametrize("variable", [LLAMA, OLLAMA])
def test_smoke(variable: str, tmp_path: Path) -> None:
    report = smoke.run(_install(variable), workdir=tmp_path, self_test=True)
    assert report.ok, "\n".join(report.lines())


def test_smoke_fails_on_a_stock_server_that_poses_as_patched(stock: smoke.Install, tmp_path: Path) -> None:
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


def test_demo(tmp_path: Path) -> None:
    report = demo.run(lambda stock: _install(STOCK if stock else LLAMA), workdir=tmp_path)
    assert report.ok, report.problems
    assert report.tokens_equal
    assert report.distinct >= 32
