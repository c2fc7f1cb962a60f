"""Options and fixtures that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ollama-source",
        default=os.environ.get("KVPATCH_OLLAMA_SOURCE"),
        help="git URL, repository or bare mirror of Ollama, for tests marked `ollama`",
    )


@pytest.fixture(scope="session")
def ollama_source(pytestconfig: pytest.Config) -> str:
    source: str | None = pytestconfig.getoption("--ollama-source")
    if not source:
        pytest.skip("needs Ollama's source: --ollama-source or KVPATCH_OLLAMA_SOURCE")
    return source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, also for the commands it runs."""
    root = tmp_path / "cache"
    monkeypatch.setenv("KVPATCH_CACHE", str(root))
    return root
