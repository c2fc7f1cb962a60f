"""Keeps the modification times of files whose content comes out the same.

Fetching resets patched files to upstream's content and the next stages patch them again. Without care each would look
new to ninja and go. So before a tree is touched the hash and time of every file that may change is recorded, and after
the last source stage files with the same bytes get their old time back (the idea is Electron's patches-mtime-cache).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvpatch import hashing, paths
from kvpatch.stages import worktree

_RECORD = Path(".kvpatch") / "mtimes.json"


def record(tree: Path) -> None:
    """Remember hash and time of the files that differ from upstream's commit. Keeps a record not yet used."""
    if not (tree / ".git").exists():
        return
    path = tree / _RECORD
    known = _load(path)
    for name in _touched(tree):
        file = tree / name
        if file.is_file() and not file.is_symlink():
            known.setdefault(name, (hashing.of_file(file), file.stat().st_mtime_ns))
    paths.write_whole(path, json.dumps(known))


def restore(tree: Path) -> int:
    """Give files whose bytes equal the record their old time; returns how many. Drops the record."""
    path = tree / _RECORD
    if not path.is_file():
        return 0
    kept = 0
    for name, (digest, mtime) in _load(path).items():
        file = tree / name
        if file.is_file() and hashing.of_file(file) == digest:
            os.utime(file, ns=(file.stat().st_atime_ns, mtime))
            kept += 1
    path.unlink()
    return kept


def _load(path: Path) -> dict[str, tuple[str, int]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): (str(digest), int(mtime)) for name, (digest, mtime) in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # Absent or damaged: then files are newer than they need be, and more is compiled.
        return {}


def _touched(tree: Path) -> set[str]:
    git = worktree.git(tree)
    names = set(worktree.changed(tree, "HEAD"))
    roots = git.text("rev-list", "--max-parents=0", "HEAD").split()
    if len(roots) == 1:
        names.update(worktree.changed(tree, roots[0], "HEAD"))
    names.update(git.text("ls-files", "--others", "--exclude-standard", "-z").split("\0"))
    names.discard("")
    return names
