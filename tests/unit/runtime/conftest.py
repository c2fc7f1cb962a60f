"""The library on the host backend, a ledger of the test's own and a context in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpatch import library
from kvpatch.runtime import (
    Context,
    Ledger,
    Library,
    Options,
    load,
)

MIB = 1 << 20


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the library compiled."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on PATH")
    root = tmp_path_factory.mktemp("cache")
    library.of_cache(root)
    return root


@pytest.fixture(scope="session")
def lib(shared_cache: Path) -> Library:
    return load(cache=shared_cache)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of the test's own."""
    return tmp_path / "ledger"


@pytest.fixture
def ledger(lib: Library, path: Path) -> Iterator[Ledger]:
    with Ledger(path, library=lib) as opened:
        yield opened


@pytest.fixture
def context(lib: Library, path: Path) -> Iterator[Context]:
    options = Options(ledger=path, name="model.gguf", group="one", limit=64 * MIB)
    with Context(options, library=lib) as opened:
        yield opened
