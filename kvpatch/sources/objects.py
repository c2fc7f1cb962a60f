"""Reading objects of repositories that are not ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvpatch.errors import GitError
from kvpatch.gitrun import Git


class ObjectView:
    """Reads objects out of any object folders without opening the repositories they belong to.

    An empty repository of our own looks through them as alternates, so neither their configuration counts (a
    partial clone would fetch what it lacks) nor can anything be written there.
    """

    def __init__(self, empty: Path, *objects: Path) -> None:
        self._git = Git(
            empty, env={"GIT_ALTERNATE_OBJECT_DIRECTORIES": os.pathsep.join(map(_quoted, objects))}
        )

    def commit(self, name: str) -> str | None:
        """Full name of a commit (abbreviations and annotated tags allowed), or None when it is not there."""
        status, out, _ = self._git.attempt(
            "rev-parse", "--quiet", "--verify", "--end-of-options", f"{name}^{{commit}}"
        )
        return out.decode().strip() if status == 0 else None

    def seconds(self, commit: str) -> int:
        """Committer time of a commit, in seconds since 1970 UTC."""
        for line in self._git.run("cat-file", "commit", commit).splitlines():
            if line.startswith(b"committer "):
                return int(line.rsplit(b" ", 2)[1])
        raise GitError(f"commit {commit} has no committer line")

    def files(self, commit: str) -> dict[str, str]:
        """Path -> blob of every file and symbolic link in a commit (submodules are left out)."""
        out = self._git.run("ls-tree", "-r", "-z", "--full-tree", commit).decode("utf-8", "surrogateescape")
        result: dict[str, str] = {}
        for entry in filter(None, out.split("\0")):
            meta, path = entry.split("\t", 1)
            _mode, kind, oid = meta.split(" ")
            if kind == "blob":
                result[path] = oid
        return result

    def absent(self, oids: Sequence[str]) -> frozenset[str]:
        """Those of the named objects that are not there."""
        unique = sorted(set(oids))
        out = self._git.run("cat-file", "--batch-check", stdin="".join(f"{o}\n" for o in unique).encode())
        return frozenset(
            line.split(" ")[0] for line in out.decode().splitlines() if line.endswith(" missing")
        )


def _quoted(path: Path) -> str:
    text = str(path)
    if os.pathsep in text or text.startswith('"'):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text
