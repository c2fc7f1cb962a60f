"""kvpatch top, limit, trim, sleep and wake as commands: envelopes, exit codes, the live picture; the doctor's part."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_upstream import envelope
from rich.console import Console

from kvpatch import cli, library
from kvpatch.cli import top
from kvpatch.pools import Device, Driver, Group, Pool, View, Way
from kvpatch.runtime import Context, Ledger, Library, Options, load

MIB = 1 << 20


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Library:
    root = tmp_path_factory.mktemp("cache")
    library.of_cache(root)
    return load(cache=root)


@pytest.fixture
def words(lib: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The library, and a ledger of the test's own."""
    for name in ("OLLAMA_KVCACHED_SOCKET", "KVCACHED_LEDGER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    return ["--build", str(lib.path), "--ledger", str(tmp_path / "ledger")]


@pytest.fixture
def context(lib: Library, tmp_path: Path) -> Any:
    with Context(Options(ledger=tmp_path / "ledger", name="m:latest", group="g"), library=lib) as opened:
        opened.reserve(8 * MIB).ensure(0, MIB)
        yield opened


def test_one_look(words: list[str], context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["top", "--once", *words, "--json"]) == 0
    told = envelope(capsys)
    assert (told["command"], told["status"], told["data"]["by"]) == ("top", "ok", "ledger")
    (device,) = told["data"]["devices"]
    assert (device["ledger_total"], device["context_bytes"], device["held"]) == (MIB, 0, MIB)
    assert device["driver_used"] == device["driver"]["used"] > 0
    assert [pool["name"] for pool in device["pools"]] == ["m:latest"]
    assert cli.run(["top", *words]) == 0  # no terminal: once, too
    text = capsys.readouterr().out
    for part in ("m:latest", "awake", "1.00 MiB of 8.00 MiB", "no limit set", f"{os.getpid()}"):
        assert part in text


def test_commands(words: list[str], context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sleep", "m", *words, "--json"]) == 0
    (outcome,) = envelope(capsys)["data"]["outcomes"]
    assert (outcome["name"], outcome["command"], outcome["freed"]) == ("m:latest", "sleep", MIB)
    assert cli.run(["limit", "512KiB", *words, "--json"]) == 0
    (limit,) = envelope(capsys)["data"]["limits"]
    assert (limit["group"], limit["limit"], limit["overage"]) == ("g", 512 * 1024, 0)
    assert cli.run(["wake", *words, "--json"]) == 10
    told = envelope(capsys)
    assert told["errors"][0]["code"] == "pools-refused"
    assert told["errors"][0]["data"]["outcomes"][0]["error"] == "KVCACHED_E_LIMIT"
    assert cli.run(["limit", "none", "--group", "g", *words]) == 0
    assert "none" in capsys.readouterr().out
    assert cli.run(["wake", str(os.getpid()), *words]) == 0
    assert cli.run(["trim", "slot:0", *words]) == 0
    assert "gave back 0 B" in capsys.readouterr().out
    context.enter()
    assert cli.run(["sleep", *words]) == 10
    text = capsys.readouterr()
    assert "E_BUSY" in text.out
    assert "next: it is in use" in text.err
    context.leave()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["top", "--by", "smoke"], 2),
        (["top", "--interval", "0"], 2),
        (["limit", "many"], 2),
        (["limit", "1GB", "--card", "--group", "g"], 2),
        (["limit", "1GB", "--by", "ollama"], 10),
        (["sleep", "--wait", "0"], 2),
        (["sleep", "--device", "cuda"], 2),
        (["sleep", "nobody"], 10),
        (["limit", "1GB", "--group", "nobody"], 10),
    ],
)
def test_exit_codes(
    argv: list[str],
    code: int,
    words: list[str],
    context: Context,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = words[:2] if argv[-1] in ("ollama", "smoke") else words
    assert cli.run([*argv, *more, "--json"]) == code
    error = envelope(capsys)["errors"][0]
    assert error["message"]
    assert error["hint"] or code == 2


def test_no_pools(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVCACHED_LEDGER", str(tmp_path / "none"))
    assert cli.run(["top", *words[:2], "--json"]) == 10
    error = envelope(capsys)["errors"][0]
    assert error["code"] == "pools-none"
    assert "ollama serve" in error["hint"]
    assert not (tmp_path / "none").exists()


def test_a_library_of_another_abi(
    words: list[str], lib: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ledger(tmp_path / "ledger", library=lib).close()
    source, other = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("unsigned kvcached_abi_version(void) { return 99; }\n", encoding="ascii")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    assert cli.run(["top", "--build", str(other), *words[2:], "--json"]) == 10
    error = envelope(capsys)["errors"][0]
    assert "its ABI is 99" in error["message"]
    assert error["hint"]


def test_the_live_picture(words: list[str], context: Context, lib: Library) -> None:
    """On a terminal it is drawn again and again, until Ctrl-C, which is no failure."""
    master, slave = pty.openpty()
    argv = [sys.executable, "-m", "kvpatch", "top", "-n", "0.1", *words]
    env = {**os.environ, "COLUMNS": "160", "TERM": "xterm"}
    shown = subprocess.Popen(argv, stdout=slave, stderr=slave, stdin=slave, env=env)
    os.close(slave)
    text = b""
    deadline = time.monotonic() + 60
    while b"2.00 MiB of 9.00 MiB" not in text and time.monotonic() < deadline:
        if b"1.00 MiB of 8.00 MiB" in text and context.stats().mapped == MIB:
            context.reserve(MIB).ensure(0, MIB)
        text += os.read(master, 4096)
    shown.send_signal(signal.SIGINT)
    while True:  # what is not read would keep the process from ending
        try:
            if not os.read(master, 4096):
                break
        except OSError:
            break
    assert shown.wait(timeout=20) == 0
    os.close(master)
    assert b"2.00 MiB of 9.00 MiB" in text, text.decode("utf-8", "replace")


def drawn(view: View, width: int, encoding: str = "utf-8") -> str:
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=raw, width=width, force_terminal=False, color_system=None, legacy_windows=False)
    console.print(top.picture(view, width))
    raw.flush()
    return raw.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def view() -> View:
    pools = (
        Pool(
            name="qwen:8b", state="waiting", group="g", slot=1, pid=42, weights_mapped=3 * MIB,
            weights_asleep=MIB, kv_mapped=MIB, kv_reserved=2 * MIB, claim=4 * MIB, context_bytes=MIB,
            charge=5 * MIB, wants=2 * MIB, queued=3, limit=8 * MIB, host_bytes=MIB, last_use_seconds=7300,
        ),
        Pool(name="", state="asleep", claim=0, last_use_seconds=3.21),
    )  # fmt: skip
    gpu = Device(
        id="8f1e", name="Test Card", limit=16 * MIB, pools=pools,
        groups=(Group(name="g", limit=4 * MIB, charge=5 * MIB),),
        driver=Driver(used=6 * MIB, total=80 * MIB, source="NVML"),
    )  # fmt: skip
    bad = Device(id="host", problem="it is torn")
    return View(way=Way.LEDGER, where="/dev/shm/x", devices=(gpu, bad), notes=("something",))


def test_the_picture_of_figures() -> None:
    text = drawn(view(), 200)
    for part in (
        "Test Card  8f1e  ledger 4.00 MiB, contexts 1.00 MiB, driver 6.00 MiB of 80.00 MiB in use, "
        "charged 5.00 MiB of 16.00 MiB",
        "g: charged 5.00 MiB, limit 4.00 MiB",
        "waiting for 2.00 MiB, 3 queued",
        "3.00 MiB of 4.00 MiB",
        "1.00 MiB of 2.00 MiB",
        "5.00 MiB of 8.00 MiB",
        "2 h",
        "3.2 s",
        "(no name)",
        "it is torn",
        "by ledger: /dev/shm/x",
        "note: something",
    ):
        assert part in text
    assert "██████████▌" in text  # three quarters of 14 cells
    assert "██████████" not in drawn(view(), 120)


def test_the_picture_without_unicode() -> None:
    text = drawn(view(), 200, "ascii")
    assert "##########...." in text  # rounded to whole cells
    assert "#######......." in text


def test_the_doctor_reads_the_servers_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("kvpatch.pools.config._running", lambda proc: ())
    monkeypatch.setattr("kvpatch.pools.config._service", lambda units: [])
    ledger = tmp_path / "ledger"
    ledger.write_bytes(b"x")
    monkeypatch.setenv("KVCACHED_LEDGER", str(ledger))
    path = tmp_path / ".ollama" / "config.yaml"
    assert cli.run(["doctor", "--json"]) == 0
    rows = {row["name"]: row for row in envelope(capsys)["data"]["findings"]}
    assert rows["config.yaml"]["status"] == "optional"
    assert str(path) in rows["config.yaml"]["found"]
    assert rows["ledger of host"]["found"].startswith(f"{ledger}, of ")
    path.parent.mkdir()
    path.write_text("kvcached:\n  memory_limit: 20\n", encoding="utf-8")
    assert cli.run(["doctor", "--json"]) == 2
    error = envelope(capsys)["errors"][0]
    assert f"{path}: line 2, kvcached.memory_limit" in error["message"]
    path.write_text("kvcached:\n  memory_limit: 20GB\n", encoding="utf-8")
    assert cli.run(["doctor"]) == 0
    assert "memory_limit: 20GB" in capsys.readouterr().out
