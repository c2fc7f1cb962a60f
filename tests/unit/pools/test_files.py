"""Which ledger files there are, and what their names say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpatch.pools import files
from tests.unit.pools.kit import BUS, UUID


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("kvcached-0-host", "host"),
        (f"kvcached-998-{UUID}", UUID),
        (f"kvcached-0-host.{BUS}", BUS),
        (f"mine.{BUS}", BUS),
        ("mine", "host"),
        (f"kvcached-0-{UUID}x", "host"),
    ],
)
def test_the_device_of_a_name(name: str, device: str) -> None:
    assert files.device_of(Path("/dev/shm") / name) == device


def made(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_bytes(b"x")
    return [folder / name for name in names]


def test_those_in_the_folder(tmp_path: Path) -> None:
    wanted = made(tmp_path, f"kvcached-0-{UUID}", "kvcached-0-host", f"kvcached-0-host.{BUS}")
    made(tmp_path, "sem.other", "kvcached-host", "kvcached-x-host")
    found = files.find(environ={}, folder=tmp_path)
    assert [file.path for file in found] == sorted(wanted)
    assert all(file.ours and not file.empty for file in found)


def test_the_variable_names_the_hosts_and_its_gpus(tmp_path: Path) -> None:
    wanted = made(tmp_path, "mine", f"mine.{BUS}")
    made(tmp_path, "mine.lock", "kvcached-0-host")
    found = files.find(environ={"KVCACHED_LEDGER": str(tmp_path / "mine")}, folder=tmp_path)
    assert [file.path for file in found] == wanted
    (one,) = files.find([wanted[1]], environ={"KVCACHED_LEDGER": "/nowhere"}, folder=tmp_path)
    assert (one.path, one.device) == (wanted[1], BUS)


def test_ours_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made(tmp_path, "kvcached-1-host", "kvcached-2-host")
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        status = real(path)
        if path != first:
            return status
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:10]])

    monkeypatch.setattr(Path, "lstat", lstat)
    assert [(file.path, file.ours) for file in files.find(environ={}, folder=tmp_path)] == [
        (second, True),
        (first, False),
    ]


def test_what_is_not_there(tmp_path: Path) -> None:
    (there,) = made(tmp_path, "there")
    gone = tmp_path / "gone"
    assert files.missing([there, gone]) == (gone,)
    assert [file.path for file in files.find([there, gone])] == [there]
    assert files.find(environ={}, folder=tmp_path / "no-such-folder") == ()


def test_an_empty_file_and_a_link_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kvcached-0-host").touch()
    (tmp_path / "kvcached-1-host").symlink_to("kvcached-0-host")
    empty, link = files.find(environ={}, folder=tmp_path)
    assert (empty.empty, link.empty) == (True, False)
    assert empty.inode != link.inode
