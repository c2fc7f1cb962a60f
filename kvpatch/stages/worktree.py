"""A work tree in the workspace: whose edits are in it, and the commit that Ollama's own patches make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from kvpatch import hashing, paths
from kvpatch.errors import SourceError
from kvpatch.gitrun import Git

_FINISHED = Path(".kvpatch") / "finished"
_GENERATED = Path(".kvpatch") / "generated.json"
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
    """Raise SourceError when patched or generated files of a finished tree were edited.

    Fetching would overwrite them, and compiling them would give a build that its manifest does not describe.
    """
    if not (tree / _FINISHED).is_file():
        return
    edited = changed(tree, "HEAD")
    edited += [
        name
        for name, digest in generated(tree).items()
        if (tree / name).is_file() and hashing.of_file(tree / name) != digest
    ]
    if edited:
        raise SourceError(
            f"{len(edited)} files in {tree} were edited by hand and would be lost: {', '.join(edited[:5])}",
            hint="copy them away, or keep the patched ones with "
            f"`git -C {tree} diff > my.patch`; then delete {tree} and build again",
        )


def generated(tree: Path) -> dict[str, str]:
    """The generated files in the tree and their sha256, as the last generate stage left them."""
    try:
        return dict(json.loads((tree / _GENERATED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # absent or damaged: then everything is taken for new


def record_generated(tree: Path, sums: Mapping[str, str]) -> None:
    """Remember what `generated` returns. Raises OSError."""
    paths.write_whole(tree / _GENERATED, json.dumps(dict(sums), indent=1))


def commit_all(tree: Path, message: str) -> str:
    """Commit every change in the tree, with fixed author and date so that the id depends on content alone."""
    repo = git(tree, env=_IDENTITY)
    repo.run("add", "--all", "--", ".")
    if repo.text("diff", "--cached", "--name-only"):
        repo.run("commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", message)
    return repo.text("rev-parse", "HEAD")
