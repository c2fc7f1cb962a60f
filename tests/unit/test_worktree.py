"""Git in a work tree of the workspace: never in the repository that the caller's shell points at."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvpatch.errors import SourceError
from kvpatch.stages import mtimes, worktree


def git(repo: Path, *words: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}
    argv = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@localhost", *words]
    return subprocess.run(argv, check=True, env=env, capture_output=True, text=True).stdout


def repository(path: Path) -> Path:
    path.mkdir()
    git(path, "init", "-q")
    (path / "file").write_text("1\n", encoding="utf-8")
    git(path, "add", ".")
    git(path, "commit", "-qm", "first")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return repository(tmp_path / "tree")


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose hook runs us: git then sets these for everything it starts."""
    repo = repository(tmp_path / "users")
    monkeypatch.setenv("GIT_DIR", str(repo / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(repo / ".git" / "index"))
    return repo


def test_inside_a_git_hook_the_user_s_repository_stays_as_it_was(tree: Path, users: Path) -> None:
    before = git(users, "log", "--format=%H"), git(users, "status", "--porcelain")
    (tree / "file").write_text("2\n", encoding="utf-8")
    mtimes.record(tree)
    commit = worktree.commit_all(tree, "ours")
    assert git(tree, "log", "--format=%H %s").splitlines()[0] == f"{commit} ours"
    assert (git(users, "log", "--format=%H"), git(users, "status", "--porcelain")) == before


def test_edits_are_those_of_the_tree_and_not_of_the_user_s_repository(tree: Path, users: Path) -> None:
    (users / "file").write_text("edited\n", encoding="utf-8")
    worktree.mark_finished(tree)
    (tree / ".git" / "info" / "exclude").write_text("/.kvpatch/\n", encoding="utf-8")
    worktree.refuse_edits(tree)
    (tree / "file").write_text("edited\n", encoding="utf-8")
    with pytest.raises(SourceError, match="edited by hand"):
        worktree.refuse_edits(tree)
    worktree.mark_unfinished(tree)
    worktree.refuse_edits(tree)


def test_the_commit_depends_on_content_alone(tmp_path: Path) -> None:
    commits = set()
    for name in ("a", "b"):
        tree = repository(tmp_path / name)
        (tree / "file").write_text("2\n", encoding="utf-8")
        commits.add(worktree.commit_all(tree, "ours"))
    assert len(commits) == 1


def test_files_with_the_same_bytes_get_their_time_back(tree: Path) -> None:
    (tree / "file").write_text("patched\n", encoding="utf-8")
    (tree / "new").write_text("generated\n", encoding="utf-8")
    for name in ("file", "new"):
        os.utime(tree / name, ns=(1, 1))
    mtimes.record(tree)
    (tree / "file").write_text("patched\n", encoding="utf-8")
    (tree / "new").write_text("another\n", encoding="utf-8")
    assert mtimes.restore(tree) == 1
    assert (tree / "file").stat().st_mtime_ns == 1
    assert (tree / "new").stat().st_mtime_ns != 1
    assert mtimes.restore(tree) == 0
