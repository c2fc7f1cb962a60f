"""Content keys: one way to hash values, files and folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SKIPPED = frozenset({"__pycache__", "build", ".git"})


def of_value(value: Any) -> str:
    """sha256 of a JSON-serialisable value, independent of dictionary order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def of_file(path: Path) -> str:
    """sha256 of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def files_under(root: Path) -> list[Path]:
    """All files below `root` in a stable order, build leftovers aside."""
    return sorted(
        p for p in root.rglob("*") if p.is_file() and not _SKIPPED.intersection(p.relative_to(root).parts)
    )


def of_paths(paths: Iterable[Path], root: Path) -> str:
    """sha256 over names (relative to `root`) and contents of files, and of all files in folders."""
    entries = []
    for path in paths:
        for file in files_under(path) if path.is_dir() else [path]:
            entries.append((file.relative_to(root).as_posix(), of_file(file)))
    return of_value(sorted(entries))
