"""A plan that needs no upstream: for tests of what comes after planning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpatch import paths
from kvpatch.plan import Plan
from kvpatch.sources import Resolved
from kvpatch.toolchain import Tool


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., Plan]:
    """Makes a plan of llama.cpp in a cache below tmp_path; keyword arguments replace its fields."""
    base = Plan(
        kind="llama.cpp",
        release=None,
        llama_cpp=Resolved(
            upstream="llama.cpp",
            kind="sdist",
            location="sdist",
            ref="0.3.35",
            commit="4df29be4f",
            key="k",
            date="2026-08-13",
            verified=True,
        ),
        ollama=None,
        llama_cpp_date="2026-08-13",
        pin_status="pinned",
        warnings=(),
        llama_cpp_patches=(),
        ollama_patches=(),
        series_id="0a1b2c3d",
        tools=(Tool(name="cc", path=Path("/usr/bin/cc"), version="12.0", origin="PATH"),),
        backend=("cpu",),
        cuda_arch=(),
        stock=False,
        jobs=1,
        out=tmp_path / "out",
        data=paths.data_dir(),
        cache=tmp_path / "cache",
        compiler_cache=None,
    )

    def make(**changes: Any) -> Plan:
        return replace(base, **changes)

    return make
