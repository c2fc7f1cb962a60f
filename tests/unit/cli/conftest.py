"""kvpatch's command line in front of the small upstream."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_upstream import CMAKE, LLAMA_C, MAIN_C, PATCH, SERVER_CMAKE, SRC_CMAKE, git

from kvpatch import cli, paths, smoke


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    repo = tmp_path / "upstream"
    for name, text in {
        "CMakeLists.txt": CMAKE,
        "src/CMakeLists.txt": SRC_CMAKE,
        "src/llama.c": LLAMA_C,
        "tools/server/CMakeLists.txt": SERVER_CMAKE,
        "tools/server/main.c": MAIN_C,
    }.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text, encoding="utf-8")
    git(tmp_path, "init", "-q", str(repo))
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "upstream")
    git(repo, "tag", "b7")
    return repo


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """kvpatch's data folder with a series and a template for that upstream, and the real vmm/."""
    real = paths.data_dir()
    root = tmp_path / "data"
    for folder in ("patches/llama.cpp", "patches/ollama", "templates/llama.cpp", "go_shim"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(real / "vmm", root / "vmm")
    shutil.copy(real / "patches" / "pins.toml", root / "patches")
    (root / "patches" / "llama.cpp" / "series").write_text("0001-glue.patch\n", encoding="utf-8")
    (root / "patches" / "llama.cpp" / "0001-glue.patch").write_text(PATCH, encoding="utf-8")
    (root / "templates" / "llama.cpp" / "manifest.toml").write_text(
        '[[file]]\ntemplate = "more.c.j2"\ndest = "src/models/more.c"\n', encoding="utf-8"
    )
    (root / "templates" / "llama.cpp" / "more.c.j2").write_text(
        "int more(void) { return {{ abi }} > 0 ? 2 : 0; }\n", encoding="utf-8"
    )
    monkeypatch.setattr(paths, "data_dir", lambda: root)
    return root


@pytest.fixture
def passing_smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(install: smoke.Install, **_: Any) -> smoke.SmokeReport:
        status = subprocess.run([install.llama_server], check=False).returncode
        check = smoke.Check(name="answer", ok=status == 42, seconds=0.0, detail=f"status {status}")
        return smoke.SmokeReport(root=str(install.root), kind=install.kind, checks=(check,))

    monkeypatch.setattr(smoke, "run", run)


@pytest.fixture
def build(cache: Path, data: Path, upstream: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*more: str, command: str = "build") -> int:
        return cli.run(
            [
                command,
                "--llama-cpp",
                "b7",
                "--llama-cpp-source",
                str(upstream),
                "--out",
                str(tmp_path / "out"),
                *more,
            ]
        )

    return run
