"""Bringing a work tree to a commit: only files whose bytes differ, all of them or none.

New contents are prepared beside the tree and old ones kept by hard link; a journal makes the swap reversible,
at once when it is interrupted and at the next start when the process was killed. HEAD moves last.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpatch.errors import PatchError
from kvpatch.patching.errors import DirtyTreeError
from kvpatch.patching.gitplumbing import Entry, Repository

STATE_FOLDER = ".kvpatch"
# Where the last commit made here is remembered; refs/worktree/ is per work tree, also where several share
# objects.
APPLIED_REF = "refs/worktree/kvpatch/applied"
_SHOWN = 10


class WorkTree:
    """The files, index and HEAD of a repository, and the state folder in it that git ignores."""

    def __init__(self, repo: Repository) -> None:
        self.repo = repo
        self.root = repo.root
        self.state = repo.root / STATE_FOLDER
        self._journal = self.state / "journal"

    def prepare(self) -> None:
        """Make the state folder, hide it from git, and undo what a killed process left half-done."""
        self.state.mkdir(exist_ok=True)
        exclude = self.repo.git_path("info/exclude")
        known = exclude.read_text(encoding="utf-8", errors="surrogateescape") if exclude.exists() else ""
        if f"/{STATE_FOLDER}/" not in known.splitlines():
            exclude.parent.mkdir(parents=True, exist_ok=True)
            with exclude.open("a", encoding="utf-8") as out:
                out.write(("" if not known or known.endswith("\n") else "\n") + f"/{STATE_FOLDER}/\n")
        self._recover()

    def head(self) -> str:
        found = self.repo.commit_of("HEAD")
        if found is None:
            raise PatchError(f"{self.root} has no commit checked out", hint="Fetch the source again.")
        return found

    def check_clean(self, acceptable: Sequence[str], *, discard: bool) -> list[str]:
        """Paths whose bytes are not HEAD's and may be overwritten.

        Raises DirtyTreeError, naming files, when a tracked file was edited by hand (its content is neither
        HEAD's nor that of one of the `acceptable` commits), or when HEAD is a commit that is none of ours.
        With `discard`, edits are given up and HEAD is left.
        """
        head = self.head()
        ours = {*acceptable, self.repo.commit_of(APPLIED_REF)}
        if head not in ours and not discard:
            raise DirtyTreeError(
                f"{self.root} is at commit {head[:12]}, which is neither the source as fetched nor made by "
                "kvpatch; applying would leave it without a name",
                hint=f"Keep it: git -C {self.root} branch mine {head[:12]}; then: "
                f"git -C {self.root} checkout --detach {acceptable[0][:12]}",
            )
        self.repo.run("update-index", "-q", "--refresh", accept=(0, 1))
        changed = self._differing(head)
        if discard or not changed:
            return [path for path in changed if not self._unavailable(path, head)]
        trees = [self.repo.entries(commit) for commit in dict.fromkeys(acceptable)]
        edited: list[str] = []
        harmless: list[str] = []
        for path in changed:
            file = self.root / path
            if not os.path.lexists(file):
                if not self._unavailable(path, head):
                    edited.append(f"{path} (deleted)")
                continue
            oid = None
            if file.is_file() and not file.is_symlink():
                oid = self.repo.text("hash-object", "--path", path, "--", str(file.absolute()))
            if any(path in tree and tree[path].oid == oid for tree in trees):
                harmless.append(path)
            else:
                edited.append(path)
        if edited:
            more = f" and {len(edited) - _SHOWN} more" if len(edited) > _SHOWN else ""
            raise DirtyTreeError(
                f"{self.root} holds edits that applying would overwrite: {', '.join(edited[:_SHOWN])}{more}",
                hint=f"Keep them: git -C {self.root} diff HEAD > edits.patch; give them up: "
                f"git -C {self.root} checkout HEAD -- .",
            )
        return harmless

    def move_to(self, commit: str, loose: Sequence[str]) -> tuple[str, ...]:
        """Make files, index and HEAD (detached) those of `commit`; returns the paths that were written.

        `loose` are paths whose bytes may differ from HEAD's and are overwritten as well. Interrupted by an
        exception or a signal that raises one, the old tree is put back before the exception goes on.
        """
        head = self.head()
        new = self.repo.entries(commit)
        old = self.repo.entries(head)
        paths = sorted({path for path in {*old, *new} if old.get(path) != new.get(path)} | set(loose))
        entries = {path: new.get(path) for path in paths}
        if any(entry is not None and entry.mode == "160000" for entry in entries.values()):
            raise PatchError(f"{self.root}: a submodule differs between {head[:12]} and {commit[:12]}")
        written = self._stage(head, commit, entries)
        try:
            for number, path in enumerate(written):
                self._swap(number, path)
            self.repo.update_index(entries)
            if paths or self._detached() != commit:
                self.repo.run("update-index", "-q", "--refresh", accept=(0, 1))
                self.repo.run("update-ref", "--no-deref", "-m", "kvpatch apply", "HEAD", commit)
            if self.repo.commit_of(APPLIED_REF) != commit:
                self.repo.run("update-ref", APPLIED_REF, commit)
        except BaseException:
            self._recover()
            raise
        shutil.rmtree(self._journal, ignore_errors=True)
        return tuple(written)

    def _differing(self, head: str) -> list[str]:
        out = self.repo.run("diff-index", "--name-only", "-z", "--no-renames", head, "--")[1]
        return [path for path in out.decode("utf-8", "surrogateescape").split("\0") if path]

    def _unavailable(self, path: str, head: str) -> bool:
        """Whether a file is absent because the clone never had its content."""
        if os.path.lexists(self.root / path):
            return False
        entry = self.repo.entries(head).get(path)
        return entry is not None and not self.repo.has(entry.oid)

    def _detached(self) -> str | None:
        status, _ = self.repo.run("symbolic-ref", "-q", "HEAD", accept=(0, 1))
        return self.head() if status == 1 else None

    def _stage(self, head: str, commit: str, entries: Mapping[str, Entry | None]) -> list[str]:
        """Prepare the journal: contents to come, links to the old ones, and what to do about it after a
        kill.
        """
        draft = self.state / "journal.draft"
        for folder in (draft, self._journal):
            if folder.exists():
                shutil.rmtree(folder)
        for folder in (draft / "new", draft / "old"):
            folder.mkdir(parents=True)
        paths: list[str] = []
        for path, entry in entries.items():
            number = str(len(paths))
            there = os.path.lexists(self.root / path)
            if entry is not None:
                fresh = draft / "new" / number
                self._write(fresh, path, entry)
                if there and _same(fresh, self.root / path):
                    fresh.unlink()
                    continue
            elif not there:
                continue
            if there:
                _link(self.root / path, draft / "old" / number)
            paths.append(path)
        plan = {"head": head, "commit": commit, "paths": paths, "index": sorted(entries)}
        (draft / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        draft.rename(self._journal)
        return paths

    def _write(self, file: Path, path: str, entry: Entry) -> None:
        if entry.mode == "120000":
            file.symlink_to(os.fsdecode(self.repo.blob(entry.oid)))
            return
        # As checkout would write it, line-ending attributes included.
        file.write_bytes(self.repo.run("cat-file", "--filters", f"--path={path}", entry.oid)[1])
        if entry.mode == "100755":
            file.chmod(file.stat().st_mode | 0o111)

    def _swap(self, number: int, path: str) -> None:
        fresh = self._journal / "new" / str(number)
        target = self.root / path
        if os.path.lexists(fresh):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh.replace(target)
        else:
            target.unlink()

    def _recover(self) -> None:
        plan_file = self._journal / "plan.json"
        if not plan_file.exists():
            return
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
        if self.repo.commit_of("HEAD") == plan["head"]:
            for number, path in enumerate(plan["paths"]):
                kept = self._journal / "old" / str(number)
                if os.path.lexists(kept):
                    if _one_inode(kept, self.root / path):
                        kept.unlink()  # not swapped; and rename does nothing between links to one file
                    else:
                        kept.replace(self.root / path)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        (self.root / path).unlink()
            # A killed git may have left its lock; it belongs to the process whose journal this is.
            with contextlib.suppress(FileNotFoundError):
                self.repo.git_path("index.lock").unlink()
            entries = self.repo.entries(plan["head"])
            self.repo.update_index({path: entries.get(path) for path in plan["index"]})
            self.repo.run("update-index", "-q", "--refresh", accept=(0, 1))
        shutil.rmtree(self._journal)


def _same(a: Path, b: Path) -> bool:
    if a.is_symlink() or b.is_symlink():
        return a.is_symlink() and b.is_symlink() and a.readlink() == b.readlink()
    if not b.is_file() or (a.stat().st_mode & 0o100) != (b.stat().st_mode & 0o100):
        return False
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)


def _one_inode(a: Path, b: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        x, y = a.lstat(), b.lstat()
        return (x.st_dev, x.st_ino) == (y.st_dev, y.st_ino)
    return False
