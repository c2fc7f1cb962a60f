"""`kvpatch service`: the service of a build is started, or handed to systemd."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_upstream import envelope

from kvpatch import cli, paths, service
from kvpatch.errors import UsageError


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build whose kvcachedd says what it was started with."""
    out = tmp_path / "out"
    program = out / service.PLACE
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    row = {"path": service.PLACE, "sha256": hashlib.sha256(program.read_bytes()).hexdigest()}
    (out / "kvpatch.json").write_text(json.dumps({"schema": 1, "artifacts": [row]}), encoding="utf-8")
    return out


def test_the_process_becomes_the_service(build: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "kvpatch", "service", "--build", build, "--socket", "/run/s",
            "--limit", "20GB", "--group", "video", "--device", "host", "--device", "0000:01:00.0",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [
        "--socket", "/run/s", "--limit", "20GB", "--group", "video", "--device", "host", "--device", "0000:01:00.0",
    ]  # fmt: skip


def test_what_cannot_be_started(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OLLAMA_KVCACHED_SOCKET", raising=False)

    def refused(code: int, *argv: str) -> str:
        assert cli.run(["service", *argv]) == code
        return capsys.readouterr().err

    assert "has no bin/kvcachedd" in refused(2, "--build", str(tmp_path), "--socket", "/run/s")
    assert "no socket to serve" in refused(2, "--build", str(build))
    assert "--user has a meaning" in refused(2, "--build", str(build), "--socket", "/run/s", "--user", "me")
    with (build / service.PLACE).open("a", encoding="utf-8") as program:
        program.write("# changed\n")
    assert "is not the one that" in refused(9, "--build", str(build), "--socket", "/run/s")
    (build / service.PLACE).unlink()
    assert "of llama.cpp alone" in refused(2, "--build", str(build), "--socket", "/run/s")


def test_units(build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "units"
    argv = ["service", "--build", str(build), "--print-units", str(folder), "--limit", "20GB", "--json"]
    assert cli.run(argv) == 0
    data = envelope(capsys)["data"]
    assert data["units"] == [str(folder / "kvcachedd.socket"), str(folder / "kvcachedd.service")]
    unit = (folder / "kvcachedd.service").read_text(encoding="utf-8")
    assert f"\nExecStart={build / service.PLACE} --limit 20GB\n" in unit
    assert "\nUser=ollama\n" in unit
    listening = (folder / "kvcachedd.socket").read_text(encoding="utf-8")
    assert f"\nListenStream={service.SOCKET}\n" in listening
    assert "\nSocketMode=0600\n" in listening
    assert "SocketGroup" not in listening

    assert cli.run([*argv, "--group", "video", "--user", "me", "--socket", "/run/x/s"]) == 0
    listening = (folder / "kvcachedd.socket").read_text(encoding="utf-8")
    for line in ("ListenStream=/run/x/s", "SocketUser=me", "SocketGroup=video", "SocketMode=0660"):
        assert f"\n{line}\n" in listening


def test_units_are_what_systemd_reads(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd-analyze")
    program = shutil.which("true")
    assert program is not None
    files = service.units(paths.data_dir(), Path(program), service.Options(limit="20GB"), "root")
    for file in files:
        (tmp_path / file.dest).write_bytes(file.content)
    done = subprocess.run(
        [verify, "verify", *(str(tmp_path / file.dest) for file in files)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_words_of_units_stand_for_themselves() -> None:
    odd = Path("/opt/100% $HOME/kvcachedd")
    (_, unit) = service.units(paths.data_dir(), odd, service.Options(), "me")
    assert b'\nExecStart="/opt/100%% $$HOME/kvcachedd"\n' in unit.content
    for wrong in (
        service.Options(group="a b"),
        service.Options(socket=Path("s")),
        service.Options(socket=Path("/a b")),
    ):
        with pytest.raises(UsageError):
            service.units(paths.data_dir(), odd, wrong, "me")


def test_the_module_has_its_glue_and_no_tests(tmp_path: Path) -> None:
    context = {
        "version": "0", "series": "s", "ollama": {"version": "0", "commit": "0"},
        "llama_cpp": {"commit": "0", "pin": "b0"},
    }  # fmt: skip
    (tmp_path / "kvcached").mkdir()
    (tmp_path / "kvcached" / "left_over.go").touch()
    service.write_module(service.module(paths.data_dir(), context), tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"go.mod", "go.sum", "cmd/kvcachedd/main.go", "proto/kvcached.pb.go"} <= names
    assert {"kvcached/kvcached.h", "kvcached/zz_generated_cgo_linux.go"} <= names
    assert not [name for name in names if name.endswith("_test.go") or "left_over" in name]
