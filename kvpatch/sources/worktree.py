"""Work trees: a folder with upstream's files exactly as recorded, and a git repository of its own around
them.

The repository borrows its objects (alternates) from the cache or from a user's mirror, has HEAD detached at
the base commit, and treats that commit as the beginning of history, so that a tree is the same whether a full
mirror or a shallow fetch stands behind it. Updating writes only files that differ; the others keep their
times, so that builds redo little. Whatever else lies in the folder is removed, except ``.kvpatch/``.

What counts as unchanged is what git's index says: a file whose size, times (nanoseconds, ctime included),
inode and mode are as they were when git last compared its content. An edit by any ordinary means changes one
of these and is found and undone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kvpatch import paths
from kvpatch.errors import GitError, guard
from kvpatch.gitrun import Git, init_repository
from kvpatch.sources.errors import SpecError, WorkspaceError
from kvpatch.sources.imports import NO_CONVERSION
from kvpatch.sources.model import Kind

KEPT = ".kvpatch"
_RECORD = "kvpatch.json"
_FORMAT = 1
_HALF_MADE = ".git.kvpatch-"
_CONFIG = """\
[core]
\trepositoryformatversion = 0
\tbare = false
\tfilemode = true
\tsymlinks = true
\tautocrlf = false
\tlogAllRefUpdates = false
\thooksPath = /dev/null
\tsparseCheckout = false
\tsparseCheckoutCone = false
[gc]
\tauto = 0
[maintenance]
\tauto = false
"""
_LEFT_BY_KILLED = ("index.lock", "HEAD.lock", "shallow.lock", "config.lock", "packed-refs.lock")
_UNFINISHED = ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-apply", "rebase-merge", "sequencer")
_ESCAPED = "\\*?[]!# "


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a work tree holds, kept inside its .git. `ready` is false while files are being written."""

    format: int
    ready: bool
    upstream: str
    kind: Kind
    location: str
    source_key: str
    key: str
    base_commit: str
    upstream_commit: str
    tree: str | None
    missing: tuple[str, ...]
    objects: str


class Worktree:
    """The work tree at one folder. The caller holds a lock on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.git_dir = path / ".git"
        self._git = Git(self.git_dir, work_tree=path, env={"GIT_OPTIONAL_LOCKS": "1"})

    def claim(self) -> None:
        """Make the folder when there is none.

        Raises WorkspaceError when it holds something that kvpatch did not make.
        """
        with guard("make the source folder", self.path):
            if self.path.exists() and not self.path.is_dir():
                raise WorkspaceError(
                    f"{self.path} is not a folder", hint="name another place for the source tree"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.git_dir / _RECORD).is_file():
                return
            foreign = sorted(
                p.name for p in self.path.iterdir() if not p.name.startswith(_HALF_MADE) and p.name != KEPT
            )
            if foreign:
                raise WorkspaceError(
                    f"{self.path} is not a source tree made by kvpatch (it holds {foreign[0]}), "
                    "and would be overwritten",
                    hint="name an empty or new folder, or remove this one yourself",
                )

    def record(self) -> Record | None:
        """What the tree holds, or None when it is new, half-written or of another format."""
        try:
            data = json.loads((self.git_dir / _RECORD).read_text(encoding="utf-8", errors="surrogateescape"))
            found = Record(**{**data, "missing": tuple(data["missing"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found if found.format == _FORMAT and found.ready else None

    def differences(self, record: Record) -> tuple[str, ...] | None:
        """How the folder differs from the base commit, a line each as in ``git status --porcelain``; None
        when git cannot tell (damaged index, objects gone).
        """
        try:
            if self._git.text("rev-parse", "--verify", "HEAD") != record.base_commit:
                return (f"HEAD is not {record.base_commit}",)
            out = self._git.run(
                "status",
                "--porcelain=v1",
                "-z",
                "--ignored=matching",
                "--untracked-files=all",
                "--no-renames",
            )
        except GitError:
            return None
        lines = [line for line in out.decode("utf-8", "surrogateescape").split("\0") if line]
        return tuple(line for line in lines if line[3:].rstrip("/").split("/", 1)[0] != KEPT)

    def descends(self, record: Record) -> bool:
        """Whether HEAD is the base commit or made upon it, with all objects at hand."""
        status, _, _ = self._git.attempt("merge-base", "--is-ancestor", record.base_commit, "HEAD")
        return status == 0

    def check_out(self, record: Record) -> None:
        """Bring the folder to `record`, whatever state it is in.

        Raises WorkspaceError, DiskFullError, AccessError.
        """
        before = self.record()
        self._set_up(record)
        sparse = self._leave_out(record.missing)
        if sparse or (before is not None and before.missing != record.missing) or not self._index_is_good():
            # Comparing contents anew keeps the times of files that are right, and forgets old holes.
            with guard("reset the index", self.git_dir):
                (self.git_dir / "index").unlink(missing_ok=True)
            self._git.run("read-tree", "--reset", record.base_commit)
        self._git.attempt("update-index", "-q", "--really-refresh")
        self._git.run("clean", "-ffdxq", "-e", f"/{KEPT}/")
        self._git.run("read-tree", "--reset", "-u", record.base_commit)
        self._git.run("update-ref", "--no-deref", "HEAD", record.base_commit)
        left = self.differences(record)
        if left:
            # What was in the way of the old commit's files may be left under the new one's.
            self._git.run("clean", "-ffdxq", "-e", f"/{KEPT}/")
            self._git.run("read-tree", "--reset", "-u", record.base_commit)
            left = self.differences(record)
        if left is None or left:
            shown = "git cannot read it" if left is None else "; ".join(left[:5])
            raise WorkspaceError(
                f"{self.path} could not be brought to {record.base_commit[:12]}: {shown}",
                hint=f"stop what writes in it, or remove it: rm -r {self.path}",
            )
        self._write(record)

    def add_base(self, commit: str, name: str | None) -> None:
        """Let the tree know a further commit: as a beginning of history, and by a tag when it was asked for
        by name.
        """
        with guard("record a commit", self.git_dir):
            shallow = self.git_dir / "shallow"
            known = shallow.read_text(encoding="ascii").split() if shallow.is_file() else []
            if commit not in known:
                paths.write_whole(shallow, "".join(f"{oid}\n" for oid in [*known, commit]))
        if name is not None:
            self._git.run("update-ref", f"refs/tags/{name}", commit)

    def _set_up(self, record: Record) -> None:
        with guard("make the source tree's repository", self.path):
            for path in self.path.glob(f"{_HALF_MADE}*"):
                shutil.rmtree(path)
            if not (self.git_dir / _RECORD).is_file():
                made = Path(tempfile.mkdtemp(prefix=_HALF_MADE, dir=self.path))
                init_repository(made, bare=True)
                paths.write_whole(made / "config", _CONFIG)
                paths.write_whole(made / _RECORD, "{}")
                made.chmod(0o755)
                made.rename(self.git_dir)
            for name in (*_LEFT_BY_KILLED, *_UNFINISHED):
                path = self.git_dir / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            # From here on the tree is in no state that anybody may use, until the end of check_out.
            paths.write_whole(self.git_dir / _RECORD, "{}")
            for name, text in (
                ("objects/info/alternates", f"{record.objects}\n"),
                ("info/attributes", NO_CONVERSION),
                ("info/exclude", f"/{KEPT}/\n"),
                ("shallow", f"{record.base_commit}\n"),
            ):
                path = self.git_dir / name
                if not path.is_file() or path.read_text(encoding="utf-8") != text:
                    paths.write_whole(path, text)

    def _leave_out(self, missing: tuple[str, ...]) -> bool:
        self._git.run("config", "core.sparseCheckout", "true" if missing else "false")
        with guard("write the source tree", self.path):
            patterns = self.git_dir / "info" / "sparse-checkout"
            if not missing:
                patterns.unlink(missing_ok=True)
                return False
            paths.write_whole(patterns, "/*\n" + "".join(f"!/{_literal(path)}\n" for path in missing))
            for path in missing:
                place = self.path / path
                if place.is_symlink() or place.is_file():
                    place.unlink()
        return True

    def _index_is_good(self) -> bool:
        if not (self.git_dir / "index").is_file():
            return False
        status, _, _ = self._git.attempt("ls-files", "--stage", "-z")
        return status == 0

    def _write(self, record: Record) -> None:
        with guard("record the source tree", self.git_dir):
            paths.write_whole(self.git_dir / _RECORD, json.dumps(asdict(record), indent=1))


def _literal(path: str) -> str:
    if "\n" in path:
        raise SpecError(
            f"the mirror lacks {path!r}, whose name cannot be left out of a work tree",
            hint="use a mirror that has it",
        )
    return "".join(f"\\{c}" if c in _ESCAPED else c for c in path)
