"""The few git commands that applying needs, through GitPython, on objects and never on a guess about the
work tree.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from kvpatch.errors import PatchError, ToolchainError

# A user's configuration (hooks, signing, line endings, rename limits) must not change what is produced.
_ENVIRONMENT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
_CONFIG = ("core.hooksPath=" + os.devnull, "core.fsmonitor=false", "core.autocrlf=false", "gc.auto=0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of a tree: its mode (``100644``, ``100755``, ``120000``, ``160000``) and object name."""

    mode: str
    oid: str


class Repository:
    """A git work tree. Every method raises PatchError naming the command when git fails."""

    def __init__(self, root: Path) -> None:
        try:
            from git import Git  # here, because importing GitPython fails on a machine without git
        except ImportError as error:
            raise ToolchainError("git cannot be run", hint="Install git, then try again.") from error
        if not root.is_dir():
            raise PatchError(f"{root} is not a directory", hint="Fetch the source first.")
        self.root = root
        self._git = Git(root)
        # A tree without a .git of its own must not make git work on a repository that happens to be around it.
        self._environment = {**_ENVIRONMENT, "GIT_CEILING_DIRECTORIES": str(root.resolve().parent)}
        self._entries: dict[str, dict[str, Entry]] = {}

    def run(
        self,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        stdin: BinaryIO | None = None,
        accept: Sequence[int] = (0,),
    ) -> tuple[int, bytes]:
        """Run a git command; returns its status, one of `accept`, and its standard output."""
        from git.exc import GitCommandNotFound

        variables = {**self._environment, **(env or {})}
        argv = ["git"]
        for setting in _CONFIG:
            argv += ["-c", setting]
        argv += [str(arg) for arg in args]
        # GitPython adds to the caller's environment and cannot take away; a GIT_DIR meant for the caller's
        # shell would send us to another repository.
        foreign = [name for name in os.environ if name.startswith("GIT_")]
        if foreign:
            argv = [
                "env",
                *(word for name in foreign for word in ("-u", name)),
                *(f"{name}={value}" for name, value in variables.items()),
                *argv,
            ]
        try:
            result: Any = self._git.execute(
                argv,
                istream=stdin,
                with_extended_output=True,
                with_exceptions=False,
                stdout_as_string=False,
                strip_newline_in_stdout=False,
                env=variables,
            )
        except GitCommandNotFound as error:
            raise ToolchainError("git cannot be run", hint="Install git, then try again.") from error
        status, stdout, stderr = result
        if status not in accept:
            detail = stderr if isinstance(stderr, str) else bytes(stderr).decode("utf-8", "replace")
            raise PatchError(
                f"`git {' '.join(str(arg) for arg in args)}` failed in {self.root} (status {status}): "
                f"{detail.strip()}"
            )
        return int(status), stdout if isinstance(stdout, bytes) else str(stdout).encode()

    def text(self, *args: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Standard output of a git command, decoded and stripped."""
        return self.run(*args, env=env)[1].decode("utf-8", "surrogateescape").strip()

    def commit_of(self, name: str) -> str | None:
        """Full name of the commit that `name` stands for, or None when the repository does not have it."""
        status, out = self.run(
            "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", accept=(0, 1, 128)
        )
        return out.decode().strip() if status == 0 else None

    def has(self, oid: str) -> bool:
        """Whether the object is there (or can be fetched lazily from a promisor)."""
        return self.run("cat-file", "-e", oid, accept=(0, 1, 128))[0] == 0

    def blob(self, oid: str) -> bytes:
        return self.run("cat-file", "blob", oid)[1]

    def entries(self, commit: str) -> dict[str, Entry]:
        """All files of a commit by path. `commit` is a full name: the answer is remembered."""
        known = self._entries.get(commit)
        if known is not None:
            return known
        found: dict[str, Entry] = {}
        for record in self.run("ls-tree", "-r", "-z", "--full-tree", commit)[1].split(b"\0"):
            if record:
                meta, _, path = record.partition(b"\t")
                mode, _, oid = meta.decode().split(" ")
                found[path.decode("utf-8", "surrogateescape")] = Entry(mode=mode, oid=oid)
        self._entries[commit] = found
        return found

    def write_blob(self, data: bytes) -> str:
        """Store bytes as they are, without filters; returns the object name."""
        with tempfile.TemporaryDirectory(prefix="kvpatch-") as folder:
            file = Path(folder) / "blob"
            file.write_bytes(data)
            return self.text("hash-object", "-w", "--no-filters", "--", file)

    def commit(
        self, parent: str, files: Mapping[str, Entry], *, message: str, author: Mapping[str, str]
    ) -> str:
        """A commit on `parent` with `files` replaced. The same input gives the same object name.

        `author` holds name, email and date (git's raw ``seconds zone``) and is used for the committer as
        well.
        """
        identity = {
            f"GIT_{role}_{key.upper()}": value
            for role in ("AUTHOR", "COMMITTER")
            for key, value in author.items()
        }
        with tempfile.TemporaryDirectory(prefix="kvpatch-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.run("read-tree", parent, env=index)
            self.update_index(files, env=index)
            # A mirror may lack large blobs that nobody needs; their names are still part of the tree.
            tree = self.text("write-tree", "--missing-ok", env=index)
            text = Path(folder) / "message"
            text.write_text(message, encoding="utf-8", newline="")
            return self.text("commit-tree", tree, "-p", parent, "-F", text, env=identity)

    def update_index(
        self, files: Mapping[str, Entry | None], *, env: Mapping[str, str] | None = None
    ) -> None:
        """Set entries of the index (None removes) without looking at the work tree."""
        if not files:
            return
        with tempfile.TemporaryFile() as records:
            for path, entry in files.items():
                mode, oid = (entry.mode, entry.oid) if entry is not None else ("0", "0" * 40)
                records.write(f"{mode} {oid}\t".encode() + path.encode("utf-8", "surrogateescape") + b"\0")
            records.seek(0)
            self.run("update-index", "-z", "--index-info", stdin=cast("BinaryIO", records), env=env)

    def merge_file(self, ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
        """3-way merge of contents as git does it; None when there are conflicts."""
        with tempfile.TemporaryDirectory(prefix="kvpatch-") as folder:
            names = [Path(folder) / name for name in ("ours", "base", "theirs")]
            for name, data in zip(names, (ours, base, theirs), strict=True):
                name.write_bytes(data)
            # The status is the number of conflicts; 255 is an error, such as binary content.
            status, merged = self.run("merge-file", "-p", *names, accept=range(256))
            return merged if status == 0 else None

    def renamed_to(self, path: str, old: str, new: str) -> str | None:
        """What git's rename detection calls `path` of commit `old` in commit `new`; None when it finds
        nothing.
        """
        status, out = self.run(
            "diff-tree",
            "-r",
            "-z",
            "--find-renames=50%",
            "--diff-filter=R",
            "--name-status",
            old,
            new,
            accept=(0, 1, 128),
        )
        if status != 0:
            return None  # blobs that rename detection wanted are missing from this clone
        fields = out.decode("utf-8", "surrogateescape").split("\0")
        for i in range(0, len(fields) - 2, 3):
            if fields[i + 1] == path:
                return fields[i + 2]
        return None

    def paths_with_line(self, commit: str, line: bytes) -> list[str]:
        """Paths of a commit's text files in which the bytes of `line` occur."""
        _, out = self.run(
            "grep",
            "-l",
            "-I",
            "-z",
            "-F",
            "-e",
            line.decode("utf-8", "surrogateescape"),
            commit,
            accept=(0, 1, 2, 128),
        )
        prefix = commit + ":"
        names = out.decode("utf-8", "surrogateescape").split("\0")
        return [name[len(prefix) :] for name in names if name.startswith(prefix)]

    def git_path(self, name: str) -> Path:
        """Where git keeps a file of its own (``info/exclude``), also in a linked work tree."""
        return self.root / self.text("rev-parse", "--git-path", name)
