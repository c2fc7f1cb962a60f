"""Ledger files: which there are, whose they are, and which device each is of. Nothing is opened or created."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LEDGER_DIR = Path("/dev/shm")
VARIABLE = "KVCACHED_LEDGER"
_NAME = re.compile(r"kvcached-\d+-(?P<device>.+)")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BUS = re.compile(r"(?P<host>.*)\.(?P<bus>[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])")


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerFile:
    """A file as its folder shows it. `device`: see `device_of`."""

    path: Path
    device: str
    owner: int
    inode: tuple[int, int]
    empty: bool  # of no bytes: whoever made it has not filled it in

    @property
    def ours(self) -> bool:
        return self.owner == os.geteuid()


def device_of(path: Path) -> str:
    """The device that the name of a ledger stands for: a GPU's UUID or PCI bus id, else "host"."""
    bus = _BUS.fullmatch(path.name)
    if bus is not None:
        return bus["bus"]
    named = _NAME.fullmatch(path.name)
    if named is not None and _UUID.fullmatch(named["device"]):
        return named["device"]
    return "host"


def find(
    named: Sequence[Path] = (), *, environ: Mapping[str, str] = os.environ, folder: Path = LEDGER_DIR
) -> tuple[LedgerFile, ...]:
    """The ledgers of this machine, ours first: those named, else those of KVCACHED_LEDGER, else all in /dev/shm.

    A ledger of the host has the ones of GPUs without a UUID beside it, as PATH.<bus id>. Files that are named and do
    not exist are left out: see `missing`.
    """
    if named:
        paths = list(named)
    elif environ.get(VARIABLE):
        paths = _with_buses(Path(environ[VARIABLE]))
    else:
        paths = sorted(_listed(folder, "kvcached-"))
    seen = [file for path in dict.fromkeys(paths) if (file := _look(path)) is not None]
    return tuple(sorted(seen, key=lambda file: not file.ours))


def missing(named: Sequence[Path]) -> tuple[Path, ...]:
    """Those of the named files that are not there."""
    return tuple(path for path in named if _look(path) is None)


def _with_buses(path: Path) -> list[Path]:
    return [
        path,
        *(p for p in sorted(_listed(path.parent, path.name + ".")) if _BUS.fullmatch(p.name)),
    ]


def _listed(folder: Path, prefix: str) -> list[Path]:
    try:
        names = os.listdir(folder)  # noqa: PTH208 - one call that fails in one place
    except OSError:
        return []
    if prefix != "kvcached-":
        return [folder / name for name in names if name.startswith(prefix)]
    return [folder / name for name in names if _NAME.fullmatch(name)]


def _look(path: Path) -> LedgerFile | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return LedgerFile(
        path=path,
        device=device_of(path),
        owner=status.st_uid,
        inode=(status.st_dev, status.st_ino),
        empty=stat.S_ISREG(status.st_mode) and status.st_size == 0,
    )
