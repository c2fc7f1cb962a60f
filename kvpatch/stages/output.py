"""The output folder: what is in it, and how a new build takes the place of an old one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kvpatch import hashing
from kvpatch.errors import CompileError, UsageError

MANIFEST = "kvpatch.json"
# The second is what a crash may leave of writing the first.
_OWN = (MANIFEST, f".{MANIFEST}.part")


def names(root: Path) -> list[str]:
    """Every file and link below `root` but the manifest, sorted."""
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(name for name in found if name not in _OWN)


def describe(root: Path) -> list[dict[str, Any]]:
    """Every file and link below `root`, sorted: path, size in bytes and sha256, or the link's target."""
    rows: list[dict[str, Any]] = []
    for name in names(root):
        path = root / name
        if path.is_symlink():
            rows.append({"path": name, "link": str(path.readlink())})
        elif path.is_file():
            rows.append(
                {
                    "path": name,
                    "size": path.stat().st_size,
                    "sha256": hashing.of_file(path),
                    "mtime_ns": path.stat().st_mtime_ns,
                }
            )
    return rows


def unchanged(root: Path, artifacts: list[dict[str, Any]]) -> bool:
    """Whether `root` still holds what `describe` said, judged by size and time (cheap; `kvpatch verify` hashes)."""
    for row in artifacts:
        path = root / row["path"]
        if "link" in row:
            if not path.is_symlink() or str(path.readlink()) != row["link"]:
                return False
            continue
        try:
            status = path.lstat()
        except OSError:
            return False
        if status.st_size != row["size"] or status.st_mtime_ns != row["mtime_ns"]:
            return False
    return True


def check_replaceable(out: Path) -> None:
    """Raise UsageError unless `out` is absent, empty, or an earlier build of ours with nothing added."""
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise UsageError(f"--out {out} is not a folder", hint="name another folder")
        place = next(folder for folder in (out, *out.parents) if folder.exists())
        # The folder itself is replaced, so its parent must be writable too.
        writable = all(
            os.access(folder, os.W_OK) for folder in {place, out.parent if out.exists() else place}
        )
    except PermissionError as error:
        raise UsageError(
            f"--out {out}: {error.filename} may not be entered", hint="name another folder"
        ) from error
    if not writable:
        raise UsageError(f"--out {out}: {place} is not writable", hint="name another folder")
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        ours = {row["path"] for row in manifest["artifacts"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    foreign = [name for name in names(out) if name not in ours]
    if foreign:
        raise UsageError(
            f"--out {out} holds {len(foreign)} files that are not from kvpatch; they would be lost: "
            + ", ".join(foreign[:5]),
            hint="move them away, or name an empty or new folder",
        )


def prepare(out: Path) -> None:
    """Make the folder that `out` will stand in, before minutes are spent on what goes there.

    Raises UsageError when that cannot be, or when `check_replaceable` says no.
    """
    check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.").cleanup()
    except OSError as error:
        raise UsageError(
            f"--out {out} cannot be written: {error.strerror or error}", hint="name another folder"
        ) from error


def replace(staging: Path, out: Path) -> None:
    """Put a copy of `staging` where `out` is; an older build stays in place until the copy is complete.

    Raises UsageError when files of somebody else are there, CompileError when the copy cannot be made; `out` is then
    as it was.
    """
    check_replaceable(out)
    fresh = out.with_name(f".{out.name}.new")
    old = out.with_name(f".{out.name}.old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(staging, fresh, symlinks=True)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        raise CompileError(
            f"cannot write the build to {out}: {error.strerror or error}",
            hint="free space or give another --out; what was compiled is kept, so building again is quick",
        ) from error
    shutil.rmtree(old, ignore_errors=True)
