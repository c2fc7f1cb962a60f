"""Options by what `--help` names; the servers are scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch.process import ProcessFailure
from kvpatch.smoke import options


def _server(folder: Path, help_: str, status: int = 0) -> Path:
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{help_}\nEND\nexit {status}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_new_server(tmp_path: Path) -> None:
    server = _server(tmp_path, "-lm,   --load-mode MODE    none, mmap\n--log-prefix, --no-log-prefix  prefix")
    assert options.without_memory_map(server) == ("--load-mode", "none")
    assert options.on_cpu(server) == ("--device", "none", "--no-log-prefix")


def test_an_older_server(tmp_path: Path) -> None:
    server = _server(
        tmp_path, "--no-mmap   do not memory-map the model\n--log-prefix  prefix, see --no-webui"
    )
    assert options.without_memory_map(server) == ("--no-mmap",)
    assert options.on_cpu(server) == ("--device", "none")
    assert options.if_known(server, "--load") == ()
    assert {"--no-webui", "--log-prefix"} <= options.known_options(server)


def test_a_server_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailure):
        options.known_options(_server(tmp_path, "error while loading shared libraries", 127))
