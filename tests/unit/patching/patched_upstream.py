"""A made-up upstream: a git repository that tests fill, change and make patches on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvpatch.patching import Patch, load_series

Edit = Callable[[bytes], bytes]
_IDENTITY = ("-c", "user.name=Ann Author", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false")


def git(where: Path, *args: str | Path, when: str = "2026-08-01T12:00:00+0200") -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_DATE": when,
        "GIT_COMMITTER_DATE": when,
    }
    done = subprocess.run(
        ["git", *_IDENTITY, *map(str, args)], cwd=where, env=env, check=True, capture_output=True
    )
    return done.stdout.decode("utf-8", "surrogateescape").strip()


def insert_after(anchor: str, new: str) -> Edit:
    """An edit that puts the line `new` behind the one line that is `anchor`."""

    def edit(data: bytes) -> bytes:
        line = anchor.encode() + b"\n"
        assert data.count(line) == 1, f"{anchor!r} is there {data.count(line)} times"
        return data.replace(line, line + new.encode() + b"\n")

    return edit


@dataclass
class Upstream:
    """`tree` is the work tree that patches are applied to, `series` the directory of patches."""

    root: Path
    tree: Path = field(init=False)
    series: Path = field(init=False)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree, self.series = self.root / "tree", self.root / "series"
        for folder in (self.tree, self.series):
            folder.mkdir(parents=True)
        git(self.tree, "init", "-q", "-b", "main")

    def commit(self, files: Mapping[str, bytes | None], message: str = "change") -> str:
        """Commit file contents (None removes) and return the commit."""
        for name, data in files.items():
            file = self.tree / name
            if data is None:
                file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        git(self.tree, "add", "-A")
        git(self.tree, "commit", "-q", "--allow-empty", "-m", message)
        return self.head()

    def head(self) -> str:
        return git(self.tree, "rev-parse", "HEAD")

    def read(self, name: str) -> bytes:
        return (self.tree / name).read_bytes()

    def make_patch(
        self,
        name: str,
        edits: Mapping[str, Edit],
        hooks: Sequence[tuple[str, str]],
        *,
        context: int = 1,
        range_: str = ">=0.1",
        extra: str = "",
    ) -> Path:
        """Write a patch with format-patch, made on HEAD, and list it; the tree is put back."""
        base = self.head()
        trailers = [f"Kvpatch-Range: {range_}", f"Kvpatch-Base: {base}", "Kvpatch-Why: the test needs it"]
        trailers += ["Upstream-Status: Inappropriate [test]"]
        trailers += [f"Kvpatch-Hook: {path}: {line}" for path, line in hooks]
        for path, edit in edits.items():
            (self.tree / path).write_bytes(edit((self.tree / path).read_bytes()))
        git(
            self.tree,
            "commit",
            "-q",
            "-a",
            "-m",
            f"{name}: a call site\n\nBody.\n\n" + "\n".join(trailers) + extra,
        )
        options = ("--full-index", "--zero-commit", "--no-signature", "--no-stat", f"-U{context}", "--stdout")
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        mail = subprocess.run(
            ["git", "format-patch", *options, "-1"], cwd=self.tree, env=env, check=True, capture_output=True
        ).stdout
        file = self.series / f"{name}.patch"
        file.write_bytes(mail)
        git(self.tree, "reset", "-q", "--hard", base)
        self.list(file.name)
        return file

    def list(self, *names: str) -> None:
        self.names += [name for name in names if name not in self.names]
        (self.series / "series").write_text("# order\n" + "\n".join(self.names) + "\n", encoding="utf-8")

    def patches(self) -> tuple[Patch, ...]:
        return load_series(self.series).patches


def c_file(functions: Sequence[str] = ("alpha", "beta", "gamma", "delta")) -> bytes:
    """A C file whose functions look alike but for one line each."""
    parts = ["#include <stdio.h>", '#include "store.h"', ""]
    for name in functions:
        parts += [
            f"int {name}(struct store *s, int n)",
            "{",
            "    int ok = 0;",
            "    if (n < 0) {",
            "        return -1;",
            "    }",
            f"    {name}_lock(s);",
            "    ok = store_put(s, n);",
            "    if (!ok) {",
            "        return -2;",
            "    }",
            f"    {name}_unlock(s);",
            "    return 0;",
            "}",
            "",
        ]
    return "\n".join(parts).encode() + b"\n"
