"""Work trees: exact, updated in place, and recovered from any state."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpatch.errors import AccessError, DiskFullError
from kvpatch.sources import Store, Tree
from kvpatch.sources.errors import WorkspaceError

from .conftest import FAKE, FakeUpstream, check_exact, fetch, git, run_as_nobody, times


@pytest.fixture
def tree(upstream: FakeUpstream, store: Store, tmp_path: Path) -> Tree:
    return fetch(store, str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree")[1]


def again(upstream: FakeUpstream, store: Store, tree: Tree, tag: str = "v0.1.0") -> Tree:
    return fetch(store, str(upstream.bare), upstream.pin(tag), tree.path)[1]


def test_switching_writes_only_what_differs(upstream: FakeUpstream, store: Store, tree: Tree) -> None:
    before = times(tree.path)
    time.sleep(0.02)
    check_exact(again(upstream, store, tree, "v0.2.0"), upstream.bare, "v0.2.0")
    after = times(tree.path)
    assert {name for name in after if after[name] != before.get(name)} == {"main.go", "docs/new.txt"}
    assert set(before) - set(after) == {"mixed.txt"}
    check_exact(again(upstream, store, tree), upstream.bare, "v0.1.0")
    back = times(tree.path)
    assert {name for name in back if back[name] != before[name]} == {"main.go", "mixed.txt"}


def test_nothing_to_do_touches_nothing(upstream: FakeUpstream, store: Store, tree: Tree) -> None:
    before = times(tree.path)
    assert again(upstream, store, tree) == tree
    os.utime(tree.path / "main.go")  # a new time alone is no difference
    touched = (tree.path / "main.go").stat().st_mtime_ns
    assert again(upstream, store, tree) == tree
    assert times(tree.path) == {**before, "main.go": touched}


def test_every_kind_of_edit_is_undone(upstream: FakeUpstream, store: Store, tree: Tree) -> None:
    path = tree.path
    stood = times(path)
    (path / "main.go").write_text("edited")
    same_size = path / "crlf.txt"
    status = same_size.stat()
    same_size.write_bytes(b"ONE\r\nTWO\r\n")
    os.utime(same_size, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time as before: ctime tells
    (path / "run.sh").chmod(0o644)
    (path / "link").unlink()
    (path / "link").write_text("no link")
    shutil.rmtree(path / "docs")
    (path / "docs").symlink_to("/etc")
    (path / "ignored/extra.o").write_text("ignored and untracked")
    (path / "build").mkdir()
    (path / "build/out.o").write_text("x")
    git(path, "init", "-q", "nested")
    (path / "nested/file").write_text("x")
    (path / ".kvpatch/rejects").mkdir(parents=True)
    (path / ".kvpatch/rejects/1").write_text("kept")
    (path / ".kvpatch/rejects/2.o").write_text("kept although ignored by the tree's rules")
    git(path, "config", "user.name", "somebody")
    result = again(upstream, store, tree)
    assert (path / ".kvpatch/rejects/1").read_text() == "kept"
    assert (path / ".kvpatch/rejects/2.o").exists()
    assert Path("/etc/passwd").exists()
    after = {k: v for k, v in times(path).items() if not k.startswith(".kvpatch")}
    unchanged = {"weights.bin", "big.dat", "mixed.txt", ".gitignore", "ignored/kept.o", "wide.u16"}
    assert {k: after[k] for k in unchanged} == {k: stood[k] for k in unchanged}
    shutil.rmtree(path / ".kvpatch")
    check_exact(result, upstream.bare, "v0.1.0")


def test_kept_folder_is_no_difference(upstream: FakeUpstream, store: Store, tree: Tree) -> None:
    (tree.path / ".kvpatch").mkdir()
    (tree.path / ".kvpatch/state").write_text("x")
    said: list[str] = []
    resolved = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    store.materialize(resolved, tree.path, progress=said.append)
    assert said == []
    assert git(tree.path, "status", "--porcelain") == ""


def test_commits_on_top_are_undone_or_left(upstream: FakeUpstream, store: Store, tree: Tree) -> None:
    (tree.path / "main.go").write_text("patched\n")
    git(tree.path, "commit", "-q", "-am", "patch")
    patched = git(tree.path, "rev-parse", "HEAD")
    stood = times(tree.path)
    resolved = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    assert store.materialize(resolved, tree.path, pristine=False) == tree
    assert git(tree.path, "rev-parse", "HEAD") == patched
    assert times(tree.path) == stood
    assert store.materialize(resolved, tree.path) == tree
    check_exact(tree, upstream.bare, "v0.1.0")
    # of another source nothing can be left
    git(tree.path, "checkout", "-q", patched)
    other = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.2.0"))
    check_exact(store.materialize(other, tree.path, pristine=False), upstream.bare, "v0.2.0")


@pytest.mark.parametrize(
    "harm",
    ["index", "index-gone", "locks", "head", "record", "alternates", "rebase", "attributes", "shallow"],
)
def test_damaged_repository_is_repaired(harm: str, upstream: FakeUpstream, store: Store, tree: Tree) -> None:
    inside = tree.path / ".git"
    before = times(tree.path)
    if harm == "index":
        (inside / "index").write_bytes(b"garbage")
    elif harm == "index-gone":
        (inside / "index").unlink()
    elif harm == "locks":
        for name in ("index.lock", "HEAD.lock"):
            (inside / name).touch()
        (tree.path / "main.go").write_text("half-writ")
    elif harm == "head":
        (inside / "HEAD").write_text("ref: refs/heads/other\n")
    elif harm == "record":
        (inside / "kvpatch.json").write_text('{"format": 0')
    elif harm == "alternates":
        (inside / "objects/info/alternates").write_text("/nonexistent\n")
    elif harm == "rebase":
        (inside / "rebase-apply").mkdir()
        (inside / "rebase-apply/patch").touch()
        (tree.path / "main.go").write_text("half-way")
    elif harm == "attributes":
        (inside / "info/attributes").unlink()
        (tree.path / "crlf.txt").touch()
        (tree.path / "main.go").write_text("x")
    else:
        (inside / "shallow").unlink()
        (inside / "index").unlink()
    check_exact(again(upstream, store, tree), upstream.bare, "v0.1.0")
    after = times(tree.path)
    assert {k for k in after if after[k] != before[k]} <= {"main.go", "crlf.txt"}
    assert not list(inside.glob("*.lock"))


def test_cache_removed_under_the_tree(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(upstream.work, folder, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    _, tree = fetch(store, str(folder), upstream.pin("v0.2.0"), tmp_path / "tree")
    before = times(tree.path)
    shutil.rmtree(store.root)
    _, new = fetch(store, str(folder), upstream.pin("v0.2.0"), tmp_path / "tree")
    assert new == tree
    assert times(tree.path) == before


def test_foreign_folder_is_refused(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    resolved = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    with pytest.raises(WorkspaceError, match=r"holds thesis\.txt"):
        store.materialize(resolved, mine)
    with pytest.raises(WorkspaceError, match="not a source tree"):
        store.materialize(resolved, upstream.work)
    with pytest.raises(WorkspaceError, match="not a folder"):
        store.materialize(resolved, mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    check_exact(store.materialize(resolved, empty), upstream.bare, "v0.1.0")


def child(*lines: str) -> subprocess.Popen[str]:
    script = "\n".join(
        ("import sys, resource; from pathlib import Path; from kvpatch.sources import *", *lines)
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_killed_while_writing(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    upstream.release("v1.0.0", {f"many/{n // 100}/{n}.txt": f"{n}\n" * 200 for n in range(3000)})
    dest = tmp_path / "tree"
    last = dest / "many/29/2999.txt"
    for _ in range(5):  # on a busy machine it may be done before we look
        shutil.rmtree(dest, ignore_errors=True)
        job = child(
            f"store = Store(Path({str(store.root)!r}))",
            "up = Upstream(name='ollama', url='x'); pin = Pin(ref='v1.0.0')",
            f"store.materialize(store.resolve(up, {str(upstream.bare)!r}, pin), Path({str(dest)!r}))",
        )
        limit = time.monotonic() + 60
        while not (dest / "many/0").is_dir():
            assert time.monotonic() < limit
            time.sleep(0.001)
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        if not last.exists():
            break
    else:
        pytest.skip("was never caught half-way")
    _, tree = fetch(store, str(upstream.bare), upstream.pin("v1.0.0"), dest)
    check_exact(tree, upstream.bare, "v1.0.0")


@pytest.mark.parametrize("limit", [20_000, 250_000])
def test_no_room(limit: int, upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    # A limit on file size is the one full disk that a test can have for itself.
    job = child(
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
        f"store = Store(Path({str(store.root)!r}))",
        "up = Upstream(name='ollama', url='x'); pin = Pin(ref='v0.1.0')",
        "try:",
        f"    store.materialize(store.resolve(up, {str(upstream.bare)!r}, pin), Path({str(tmp_path / 'tree')!r}))",
        "except Exception as error:",
        "    print(type(error).__name__, error.exit_code, error, error.hint)",
    )
    out, _ = job.communicate(timeout=60)
    assert out.startswith("DiskFullError 4 "), out
    assert str(tmp_path / "tree") in out
    assert "--out" in out
    _, tree = fetch(store, str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")


def test_no_room_for_python_files(
    upstream: FakeUpstream, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))

    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskFullError, match="No space left"):
            store.materialize(resolved, tmp_path / "tree")
    check_exact(store.materialize(resolved, tmp_path / "tree"), upstream.bare, "v0.1.0")


def test_no_permission(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    resolved = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    (tmp_path / "file").touch()
    with pytest.raises(AccessError, match="file"):
        store.materialize(resolved, tmp_path / "file" / "tree")
    if os.geteuid() == 0:
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o005 != 0o005 and str(folder).startswith("/tmp/"):
                folder.chmod(0o755)
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o755)
        ours = tmp_path / "ours"
        ours.mkdir()
        os.chown(ours, 65534, 65534)
        other = Store(ours / "cache")
        answer = run_as_nobody(
            lambda: other.materialize(
                other.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0")), closed / "tree"
            )
        )
        assert answer.startswith("AccessError: "), answer
        assert str(closed / "tree") in answer
    else:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        with pytest.raises(AccessError, match="closed"):
            store.materialize(resolved, closed / "tree")
