"""The config.yaml of `ollama serve`: where it is, and whether the server would take it."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvpatch.pools import config

SETTINGS = Path(__file__).resolve().parents[3] / "go_shim" / "kvcached" / "settings.go"


def home(folder: Path, text: str) -> Path:
    (folder / ".ollama").mkdir(parents=True)
    path = folder / ".ollama" / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_keys_are_the_servers() -> None:
    table = SETTINGS.read_text(encoding="utf-8").partition("var table = ")[2].partition("\n}\n")[0]
    keys = re.findall(r'\{\w+, "(\w+)", \w+\}', table)
    assert len(keys) > 5
    assert list(config.CHECKS) == keys


@pytest.mark.parametrize(
    ("text", "settings", "problems"),
    [
        ("", (), ()),
        ("# nothing\n", (), ()),
        ("other: [1\n, 2]\nkvcached:\n", (), ()),
        (
            "kvcached:\n  enabled: yes\n  memory_limit: 19.5GiB\n",
            ("enabled: yes", "memory_limit: 19.5GiB"),
            (),
        ),
        ("size: &s 2GB\nkvcached:\n  memory_limit: *s\n", ("memory_limit: 2GB",), ()),
        ("kvcached: true\n", (), ("line 1: kvcached must be a section: indented lines, as `enabled: true`",)),
        ("- kvcached\n", (), ("line 1: the file must hold `key: value` pairs",)),
        ("kvcached:\n  enabled:\n", (), ("line 2, kvcached.enabled: needs a single value",)),
        (
            "kvcached:\n  enabled: on\n  enabled: on\n",
            ("enabled: on",),
            ("line 3, kvcached.enabled: is set twice",),
        ),
        ("kvcached: {}\nkvcached: {}\n", (), ("line 2: the section kvcached is there a second time",)),
    ],
)
def test_files(text: str, settings: tuple[str, ...], problems: tuple[str, ...], tmp_path: Path) -> None:
    assert config.read(home(tmp_path, text)) == (settings, problems)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kvcached: [\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("kvcached:\n  memory: 20GB\n", "no such key; there are enabled, memory_limit"),
    ],
)
def test_files_that_the_server_refuses(text: str, says: str, tmp_path: Path) -> None:
    _, (problem,) = config.read(home(tmp_path, text))
    assert says in problem


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("enabled", ["1", "True", "off"], ["2", "maybe"]),
        ("memory_limit", ["20GB", "1.5 gib", "512MiB"], ["20", "0GB", "-1GB", "20KB", "GB"]),
        ("host_memory_limit", ["20GB"], ["20"]),
        ("socket", ["/nowhere/s"], ["s", "/" + "x" * 107, "/tmp"]),
        ("eviction_policy", ["lru", "LRU"], ["fifo"]),
        ("idle_seconds", ["0", "1000000000"], ["1000000001", "1.5", "-1"]),
        ("sleep_seconds", ["1"], ["0"]),
        ("max_ctx", ["65536"], ["0", "64K"]),
        ("group", ["root"], ["no-such-group"]),
    ],
)
def test_values(key: str, good: list[str], bad: list[str]) -> None:
    assert [config.CHECKS[key](value) for value in good] == [""] * len(good)
    assert all(config.CHECKS[key](value) for value in bad)


def test_of_a_user_without_a_server(tmp_path: Path) -> None:
    home(tmp_path / "me", "kvcached:\n  enabled: true\n")
    (found,) = config.examine(proc=tmp_path, units=(), environ={"HOME": str(tmp_path / "me")})
    assert found.path == str(tmp_path / "me" / ".ollama" / "config.yaml")
    assert (found.exists, found.readable, found.settings) == (True, True, ("enabled: true",))
    (absent,) = config.examine(proc=tmp_path, units=(), environ={"HOME": str(tmp_path)})
    assert (absent.exists, absent.problems) == (False, ())
    (homeless,) = config.examine(proc=tmp_path, units=(), environ={})
    assert homeless.path == ""
    assert "without HOME" in homeless.reader


def test_of_a_running_server(tmp_path: Path) -> None:
    """HOME of the process, not of whoever asks."""
    program = tmp_path / "ollama"
    program.symlink_to(sys.executable)
    (tmp_path / "serve").write_text(
        "import time\nprint('up', flush=True)\ntime.sleep(60)\n", encoding="utf-8"
    )
    env = {**os.environ, "HOME": str(tmp_path / "served")}
    server = subprocess.Popen(
        [str(program), "serve"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        found = [one for one in config.examine(units=(), environ={}) if f"pid {server.pid}," in one.reader]
        server.kill()
    assert [one.path for one in found] == [str(tmp_path / "served" / ".ollama" / "config.yaml")]


def proc(folder: Path, *, environ: bytes | None) -> Path:
    (folder / "77").mkdir(parents=True)
    (folder / "77" / "cmdline").write_bytes(b"/usr/local/bin/ollama\0serve\0")
    if environ is not None:
        (folder / "77" / "environ").write_bytes(environ)
    (folder / "78").mkdir()
    (folder / "78" / "cmdline").write_bytes(b"/usr/local/bin/ollama\0run\0serve\0")
    return folder


def test_of_a_server_whose_environment_is_closed(tmp_path: Path) -> None:
    (told,) = config.examine(proc=proc(tmp_path / "a", environ=b"A=1\0HOME=/x\0"), units=(), environ={})
    assert told.path == "/x/.ollama/config.yaml"
    (guessed,) = config.examine(proc=proc(tmp_path / "b", environ=None), units=(), environ={})
    mine = pwd.getpwuid(os.geteuid())
    assert guessed.path == f"{mine.pw_dir}/.ollama/config.yaml"
    assert "cannot be seen" in guessed.reader


def test_of_the_systemd_service(tmp_path: Path) -> None:
    etc, lib = tmp_path / "etc", tmp_path / "lib"
    for folder in (etc, lib):
        folder.mkdir()
    mine = pwd.getpwuid(os.geteuid())
    (lib / "ollama.service").write_text(f"[Service]\nUser={mine.pw_name}\nGroup=x\n", encoding="utf-8")
    proc(tmp_path / "proc", environ=None).joinpath("77", "cmdline").write_bytes(b"")
    (found,) = config.examine(proc=tmp_path / "proc", units=(etc, lib), environ={})
    assert found.path == f"{mine.pw_dir}/.ollama/config.yaml"
    assert f"runs as {mine.pw_name}" in found.reader
    (etc / "ollama.service.d").mkdir()
    (etc / "ollama.service.d" / "home.conf").write_text(
        '[Service]\nEnvironment="HOME=/srv/models" A=1\n', encoding="utf-8"
    )
    (moved,) = config.examine(proc=tmp_path / "proc", units=(etc, lib), environ={})
    assert moved.path == "/srv/models/.ollama/config.yaml"
