"""The few git commands that applying needs, on objects and never on a guess about the work tree."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpatch.errors import GitError, PatchError, guard
from kvpatch.gitrun import Git


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of a tree: its mode (``100644``, ``100755``, ``120000``, ``160000``) and object name."""

    mode: str
    oid: str


class Repository:
    """A git work tree. Every method raises PatchError naming the command when git fails, DiskFullError or AccessError
    when that is why.

    Nothing is fetched here, not even by a clone that would do so by itself: an object is there or it is not.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise PatchError(f"{root} is not a directory", hint="Fetch the source first.")
        self.root = root
        # By name of its .git: a tree without one must not make git work on a repository that happens to be around it.
        place = root.absolute()
        self._git = Git(place / ".git", work_tree=place)
        self._entries: dict[str, dict[str, Entry]] = {}

    def run(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        accept: Sequence[int] = (0,),
    ) -> tuple[int, bytes]:
        """Run a git command; returns its status, one of `accept`, and its standard output."""
        status, stdout, stderr = self._git.attempt(*args, env=env, stdin=stdin)
        if status not in accept:
            failure = self._git.failure(args, status, stderr)
            if isinstance(failure, GitError):
                raise PatchError(failure.message, hint=failure.hint) from failure
            raise failure
        return status, stdout

    def text(self, *args: str, env: Mapping[str, str] | None = None, stdin: bytes | None = None) -> str:
        """Standard output of a git command, decoded and stripped."""
        return self.run(*args, env=env, stdin=stdin)[1].decode("utf-8", "surrogateescape").strip()

    def commit_of(self, name: str) -> str | None:
        """Full name of the commit that `name` stands for, or None when the repository does not have it."""
        status, out = self.run(
            "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", accept=(0, 1, 128)
        )
        return out.decode().strip() if status == 0 else None

    def has(self, oid: str) -> bool:
        """Whether the object is there."""
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
        return self.text("hash-object", "-w", "--no-filters", "--stdin", stdin=data)

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
        with _scratch() as folder:
            index = {"GIT_INDEX_FILE": str(folder / "index")}
            self.run("read-tree", parent, env=index)
            self.update_index(files, env=index)
            # A mirror may lack large blobs that nobody needs; their names are still part of the tree.
            tree = self.text("write-tree", "--missing-ok", env=index)
            return self.text(
                "commit-tree", tree, "-p", parent, "-F", "-", env=identity, stdin=message.encode()
            )

    def update_index(
        self, files: Mapping[str, Entry | None], *, env: Mapping[str, str] | None = None
    ) -> None:
        """Set entries of the index (None removes) without looking at the work tree."""
        if not files:
            return
        records = bytearray()
        for path, entry in files.items():
            mode, oid = (entry.mode, entry.oid) if entry is not None else ("0", "0" * 40)
            records += f"{mode} {oid}\t".encode() + path.encode("utf-8", "surrogateescape") + b"\0"
        self.run("update-index", "-z", "--index-info", stdin=bytes(records), env=env)

    def merge_file(self, ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
        """3-way merge of contents as git does it; None when there are conflicts."""
        with _scratch() as folder:
            names = [folder / name for name in ("ours", "base", "theirs")]
            for name, data in zip(names, (ours, base, theirs), strict=True):
                name.write_bytes(data)
            # The status is the number of conflicts; 255 is an error, such as binary content.
            status, merged = self.run("merge-file", "-p", *map(str, names), accept=range(256))
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


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with (
        guard("write temporary files", Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="kvpatch-") as folder,
    ):
        yield Path(folder)
