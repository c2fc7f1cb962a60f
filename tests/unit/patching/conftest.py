from __future__ import annotations

from pathlib import Path

import pytest
from patched_upstream import Upstream, c_file


@pytest.fixture
def upstream(tmp_path: Path) -> Upstream:
    """An empty upstream repository."""
    return Upstream(tmp_path / "up")


@pytest.fixture
def c_upstream(upstream: Upstream) -> Upstream:
    """An upstream with one C file, `src/store.c`, and a file that no patch touches."""
    upstream.commit({"src/store.c": c_file(), "README": b"read me\n"})
    return upstream
