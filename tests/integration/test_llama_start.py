"""A patched llama-server that cannot do what it was told to: it says why and ends by itself, upstream's defaults on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvpatch import smoke
from kvpatch.smoke.server import ServerSpec, start_and_wait_end
from tests.unit.test_error_words import WORDS

pytestmark = [pytest.mark.build, pytest.mark.timeout(600)]


def start(server: Path, model: Path, env: dict[str, str], folder: Path) -> tuple[int, str]:
    # No option but what names the model: among the defaults is upstream's fit, which makes a trial context first.
    def argv(port: int) -> Sequence[str | Path]:
        return [server, "--model", model, "--host", "127.0.0.1", "--port", str(port)]

    spec = ServerSpec(
        name="llama-server-start",
        argv=argv,
        ready_path="/health",
        env=lambda port: {"OLLAMA_KVCACHED_ENABLED": "true", **env},
    )
    for _ in range(3):
        status, text = start_and_wait_end(spec, folder, seconds=60.0)
        # Upstream's log is written by a thread of its own, and lost in 2 of 40 starts that end early, in stock too.
        if text:
            break
    return status, text


@pytest.fixture
def without_library(patched: smoke.Install, tmp_path: Path) -> Path:
    copy = tmp_path / "bin"
    shutil.copytree(patched.llama_server.parent, copy, symlinks=True)
    (copy / "libkvcached.so").unlink()
    return copy / patched.llama_server.name


def test_a_missing_library_ends_the_start(
    without_library: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    status, text = start(
        without_library, models["llama"], {"KVCACHED_LEDGER": str(tmp_path / "ledger")}, tmp_path
    )
    assert status > 0, text  # not by a signal
    assert "libkvcached.so" in text
    assert "install" in text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KVCACHED_LEDGER", "/nonexistent/ledger", "/nonexistent/ledger"),
        ("KVCACHED_PAGE_SIZE", "3000", "3000"),
        ("OLLAMA_KVCACHED_MEMORY_GB", "much", "OLLAMA_KVCACHED_MEMORY_GB=much"),
        ("KVCACHED_ROOM_WAIT_MS", "soon", "KVCACHED_ROOM_WAIT_MS=soon"),
        ("KVCACHED_LEASES", "host,0,100", "KVCACHED_LEASES=host,0,100 is not valid: use device,slot,limit"),
        ("KVCACHED_LEASES", "host,one,100,/x", "KVCACHED_LEASES=host,one"),
        ("KVCACHED_LEASES", "host,1,-1,/x", "KVCACHED_LEASES=host,1,-1"),
        ("KVCACHED_LEASES", ",1,100,/x", "KVCACHED_LEASES=,1"),
        ("KVCACHED_LEASES", "host,1,100,/x;HOST,2,100,/x", "each device once"),
        ("KVCACHED_LEASES", "host,3,100,/nonexistent/ledger", "/nonexistent/ledger"),
    ],
)
def test_a_setting_that_cannot_be_used_ends_the_start(
    patched: smoke.Install, models: dict[str, Path], tmp_path: Path, name: str, value: str, said: str
) -> None:
    env = {"KVCACHED_LEDGER": str(tmp_path / "ledger"), name: value}
    status, text = start(patched.llama_server, models["llama"], env, tmp_path)
    assert status > 0, text
    assert said in text


def test_a_compute_buffer_beyond_the_limit_is_no_exhausted_device(
    patched: smoke.Install, models: dict[str, Path], tmp_path: Path
) -> None:
    """Weights find room, the compute buffer does not; ggml's own words would have Ollama unload every model."""
    env = {"KVCACHED_LEDGER": str(tmp_path / "ledger"), "OLLAMA_KVCACHED_MEMORY_GB": "1MiB"}
    status, text = start(patched.llama_server, models["llama"], env, tmp_path)
    assert status > 0, text
    assert "of compute on CPU" in text
    assert "; raise OLLAMA_KVCACHED_MEMORY_GB" in text
    assert not any(words in text.lower() for words in WORDS)
