"""A work tree in the workspace: whose edits are in it, and the commit that Ollama's own patches make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvpatch.errors import SourceError
from kvpatch.sources.git import Git

_FINISHED = Path(".kvpatch") / "finished"
_IDENTITY = {
    "GIT_AUTHOR_NAME": "kvpatch",
    "GIT_AUTHOR_EMAIL": "kvpatch@localhost",
    "GIT_COMMITTER_NAME": "kvpatch",
    "GIT_COMMITTER_EMAIL": "kvpatch@localhost",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
}


def git(tree: Path, *, env: Mapping[str, str] | None = None) -> Git:
    """git on this tree and no other: a GIT_DIR meant for the caller's shell (in a hook, say) has no say in it."""
    return Git(tree / ".git", work_tree=tree, env=env)


def changed(tree: Path, *revisions: str) -> list[str]:
    """Tracked files that differ between revisions, or between one and the files on disk."""
    names = git(tree).text("diff", "--name-only", "-z", *revisions).split("\0")
    return [name for name in names if name]


def mark_finished(tree: Path) -> None:
    """Say that kvpatch has finished with the tree, so that any difference from now on is somebody's edit."""
    path = tree / _FINISHED
    path.parent.mkdir(exist_ok=True)
    path.touch()


def mark_unfinished(tree: Path) -> None:
    """Say that kvpatch is changing the tree: what differs after a crash is ours."""
    (tree / _FINISHED).unlink(missing_ok=True)


def refuse_edits(tree: Path) -> None:
    """Raise SourceError when tracked files of a finished tree were edited: fetching would overwrite them."""
    if not (tree / _FINISHED).is_file():
        return
    edited = changed(tree, "HEAD")
    if edited:
        raise SourceError(
            f"{len(edited)} files in {tree} were edited by hand and would be overwritten: {', '.join(edited[:5])}",
            hint=f"keep them with `git -C {tree} diff > my.patch`; then `git -C {tree} checkout -- .` and build again",
        )


def commit_all(tree: Path, message: str) -> str:
    """Commit every change in the tree, with fixed author and date so that the id depends on content alone."""
    repo = git(tree, env=_IDENTITY)
    repo.run("add", "--all", "--", ".")
    if repo.text("diff", "--cached", "--name-only"):
        repo.run("commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", message)
    return repo.text("rev-parse", "HEAD")
