"""The library, a machine without a GPU, and processes in a ledger of the test's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpatch import library
from kvpatch.pools import Drivers
from kvpatch.runtime import Library, load
from tests.unit.pools.kit import Process, Start


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
def drivers(tmp_path: Path) -> Drivers:
    """Of a machine without a GPU, with 900 of 1000 KiB available."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n", encoding="ascii")
    return Drivers(nvml="libkvpatch-no-such-nvml.so", smi=None, meminfo=meminfo)


@pytest.fixture
def start(lib: Library, tmp_path: Path) -> Iterator[Start]:
    """Starts a process in tmp_path/"ledger"."""
    started: list[Process] = []

    def run(
        name: str = "model:latest", *, group: str = "one", ledger: Path | None = None, slot: int = -1
    ) -> Process:
        started.append(Process(lib, ledger or tmp_path / "ledger", name, group, slot))
        return started[-1]

    yield run
    for process in started:
        process.end()
