"""A work tree in the workspace: whose edits are in it, and the commit that Ollama's own patches make."""

from __future__ import annotations

from pathlib import Path

import git

from kvpatch.errors import SourceError

_FINISHED = Path(".kvpatch") / "finished"
_IDENTITY = {
    "GIT_AUTHOR_NAME": "kvpatch",
    "GIT_AUTHOR_EMAIL": "kvpatch@localhost",
    "GIT_COMMITTER_NAME": "kvpatch",
    "GIT_COMMITTER_EMAIL": "kvpatch@localhost",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}


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
    repo = git.Repo(tree)
    edited = [name for name in repo.git.diff("--name-only", "-z", "HEAD").split("\0") if name]
    repo.close()
    if edited:
        raise SourceError(
            f"{len(edited)} files in {tree} were edited by hand and would be overwritten: {', '.join(edited[:5])}",
            hint=f"keep them with `git -C {tree} diff > my.patch`; then `git -C {tree} checkout -- .` and build again",
        )


def commit_all(tree: Path, message: str) -> str:
    """Commit every change in the tree, with fixed author and date so that the id depends on content alone."""
    repo = git.Repo(tree)
    with repo.git.custom_environment(**_IDENTITY):
        repo.git.add("--all", "--", ".")
        if repo.git.diff("--cached", "--name-only"):
            repo.git.commit("--quiet", "--no-verify", "--no-gpg-sign", "-m", message)
    commit = str(repo.git.rev_parse("HEAD"))
    repo.close()
    return commit
