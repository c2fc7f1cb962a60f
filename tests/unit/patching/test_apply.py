"""Applying for real: commits, work tree, idempotence, failures, edits by hand, interruptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patched_upstream import Upstream, c_file, git, insert_after

from kvpatch.errors import DiskFullError, PatchError
from kvpatch.gitrun import Git
from kvpatch.patching import (
    ApplyReport,
    DirtyTreeError,
    PatchFailure,
    Status,
    Verdict,
    apply_series,
    try_series,
    worktree,
)

FILE = "src/store.c"


@pytest.fixture
def three(c_upstream: Upstream) -> Upstream:
    """Three patches; the second changes two files."""
    c_upstream.commit({"src/main.c": c_file(("main", "init"))})

    def one(name: str, function: str, *files: str) -> None:
        line = f"hook_{function}();"
        edits = {FILE: insert_after(f"    {function}_lock(s);", f"    {line}")}
        hooks = [(FILE, line)]
        for file in files:
            edits[file] = insert_after("    init_lock(s);", f"    {line}")
            hooks.append((file, line))
        c_upstream.make_patch(name, edits, hooks)

    one("0001-alpha", "alpha")
    one("0002-beta", "beta", "src/main.c")
    one("0003-gamma", "gamma")
    return c_upstream


def snapshot(tree: Path) -> dict[str, tuple[bytes, int]]:
    files = (
        f for f in tree.rglob("*") if f.is_file() and ".git" not in f.parts and ".kvpatch" not in f.parts
    )
    return {str(f.relative_to(tree)): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def age(tree: Path) -> None:
    """Make all files look a day old, with an index that knows it."""
    for file in tree.rglob("*"):
        if file.is_file() and ".git" not in file.parts:
            os.utime(file, (1_700_000_000, 1_700_000_000))
    git(tree, "update-index", "--refresh")


def test_commits_are_deterministic(three: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = three.head()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(three.tree), clone)
    first = apply_series(three.tree, base, three.patches())
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody Else")
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2001-01-01T00:00:00Z")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    second = apply_series(clone, base, three.patches())
    monkeypatch.undo()
    assert first.commit == second.commit != base
    log = git(three.tree, "log", "--format=%an <%ae> %ad|%cn %cd|%s", "--date=raw", f"{base}..HEAD").split(
        "\n"
    )
    assert len(log) == 3
    assert (
        log[0]
        == "Ann Author <ann@example.org> 1785578400 +0200|Ann Author 1785578400 +0200|0003-gamma: a call site"
    )
    assert "Kvpatch-Hook: src/store.c: hook_alpha();" in git(
        three.tree, "log", "-1", "--format=%B", first.commit + "~2"
    )
    assert git(three.tree, "status", "--porcelain") == ""
    assert git(three.tree, "rev-parse", "--abbrev-ref", "HEAD") == "HEAD"
    assert git(three.tree, "rev-parse", "main") == base


def test_only_changed_files_are_written(three: Upstream) -> None:
    age(three.tree)
    before = snapshot(three.tree)
    report = apply_series(three.tree, three.head(), three.patches())
    after = snapshot(three.tree)
    assert report.written == ("src/main.c", FILE)
    assert {name for name in after if after[name] != before[name]} == {FILE, "src/main.c"}


def test_second_run_touches_nothing(three: Upstream) -> None:
    base = three.head()
    first = apply_series(three.tree, base, three.patches())
    before = snapshot(three.tree)
    second = apply_series(three.tree, base, three.patches())
    assert second.commit == first.commit
    assert second.written == ()
    assert snapshot(three.tree) == before
    assert second.to_json() == first.to_json()


def test_changed_series_rewrites_only_what_differs(three: Upstream) -> None:
    base = three.head()
    apply_series(three.tree, base, three.patches())
    age(three.tree)
    report = apply_series(three.tree, base, three.patches()[:2])
    assert report.written == (FILE,)
    report = apply_series(three.tree, base, three.patches()[:1])
    assert report.written == ("src/main.c", FILE)
    report = apply_series(three.tree, base, ())
    assert report.commit == base
    assert three.read(FILE) == c_file()


def test_every_failure_is_reported(three: Upstream) -> None:
    """Patches 1 and 3 cannot fit; 2 does and is judged too. The tree stays at the last good commit."""
    data = three.read(FILE).replace(b"    alpha_lock(s);\n", b"    alpha_take(s);\n")
    base = three.commit({FILE: data.replace(b"    gamma_lock(s);\n", b"")})
    with pytest.raises(PatchFailure) as caught:
        apply_series(three.tree, base, three.patches())
    report = caught.value.report
    assert [patch.status for patch in report.patches] == [Status.FAILED, Status.FITS, Status.FAILED]
    assert report.commit == base == three.head()
    assert caught.value.message.startswith("2 of 3 patches do not fit")
    assert "0001-alpha.patch, 0003-gamma.patch" in caught.value.message
    assert caught.value.message.count("context-changed") == 2
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("sed -n")
    assert snapshot(three.tree)[FILE][0] == three.read(FILE)
    stored = json.loads((three.tree / ".kvpatch/report.json").read_text(encoding="utf-8"))
    assert stored == caught.value.data
    assert stored["schema"] == "kvpatch.apply-report/1"
    assert (stored["patches_ok"], stored["patches_total"]) == (1, 3)
    assert sorted(f.name for f in (three.tree / ".kvpatch/rejects").iterdir()) == [
        "0001-alpha.patch",
        "0003-gamma.patch",
    ]
    reject = (three.tree / ".kvpatch/rejects/0001-alpha.patch").read_text(encoding="utf-8")
    assert reject.startswith("# 0001-alpha.patch: FAILED, 0 of 1 hunks fit")
    assert "+    hook_alpha();" in reject
    assert git(three.tree, "status", "--porcelain") == ""


def test_tree_is_left_at_the_last_good_commit(three: Upstream) -> None:
    base = three.commit({FILE: three.read(FILE).replace(b"    gamma_lock(s);\n", b"")})
    with pytest.raises(PatchFailure) as caught:
        apply_series(three.tree, base, three.patches())
    report = caught.value.report
    assert [patch.status for patch in report.patches] == [Status.APPLIED, Status.APPLIED, Status.FAILED]
    assert report.commit == three.head() == report.patches[1].commit
    assert b"hook_beta();" in three.read(FILE)
    assert b"hook_gamma();" not in three.read(FILE)
    # Once the series is right, the same call goes on and clears the rejects.
    fixed = apply_series(three.tree, base, three.patches()[:2])
    assert fixed.written == ()
    assert not (three.tree / ".kvpatch/rejects").exists()


def test_multi_file_patch_is_whole_or_not_at_all(three: Upstream) -> None:
    base = three.commit({"src/main.c": c_file(("main",))})
    with pytest.raises(PatchFailure) as caught:
        apply_series(three.tree, base, three.patches())
    second = caught.value.report.patches[1]
    assert [hunk.verdict.fits for hunk in second.hunks].count(True) == 1
    assert second.status is Status.FAILED
    assert b"hook_beta();" not in three.read(FILE)


def test_edit_by_hand_is_not_overwritten(three: Upstream) -> None:
    base = three.head()
    edited = three.read(FILE) + b"// mine\n"
    (three.tree / FILE).write_bytes(edited)
    (three.tree / "README").unlink()
    with pytest.raises(DirtyTreeError) as caught:
        apply_series(three.tree, base, three.patches())
    assert "README (deleted), src/store.c" in caught.value.message
    assert caught.value.hint is not None
    assert three.read(FILE) == edited
    assert three.head() == base
    report = apply_series(three.tree, base, three.patches(), discard=True)
    assert report.written == ("README", "src/main.c", FILE)
    assert b"// mine" not in three.read(FILE)
    assert (three.tree / "README").exists()


def test_staged_edit_is_not_overwritten(three: Upstream) -> None:
    (three.tree / FILE).write_bytes(three.read(FILE) + b"// mine\n")
    git(three.tree, "add", FILE)
    with pytest.raises(DirtyTreeError, match=r"src/store\.c"):
        apply_series(three.tree, three.head(), three.patches())


def test_commit_by_hand_is_not_left_without_a_name(three: Upstream) -> None:
    base = three.head()
    apply_series(three.tree, base, three.patches())
    mine = three.commit({"README": b"mine\n"})
    with pytest.raises(DirtyTreeError, match="made by"):
        apply_series(three.tree, base, three.patches())
    assert three.head() == mine
    apply_series(three.tree, base, three.patches(), discard=True)
    assert three.read("README") == b"read me\n"


def test_untracked_and_ignored_files_stay(three: Upstream) -> None:
    (three.tree / "src/generated.cpp").write_bytes(b"ours\n")
    apply_series(three.tree, three.head(), three.patches())
    assert three.read("src/generated.cpp") == b"ours\n"
    assert git(three.tree, "status", "--porcelain") == "?? src/generated.cpp"  # and .kvpatch is not listed


def test_reverting_a_file_by_hand_is_repaired(three: Upstream) -> None:
    base = three.head()
    pristine = three.read(FILE)
    apply_series(three.tree, base, three.patches())
    (three.tree / FILE).write_bytes(pristine)
    assert apply_series(three.tree, base, three.patches()).written == (FILE,)
    assert b"hook_alpha();" in three.read(FILE)


def test_missing_blob_of_another_file(three: Upstream) -> None:
    """A clone without some large unrelated blob, whose file is absent, is patched all the same."""
    base = three.commit({"big.bin": b"large and unrelated\n"})
    oid = git(three.tree, "rev-parse", "HEAD:big.bin")
    (three.tree / ".git/objects" / oid[:2] / oid[2:]).unlink()
    (three.tree / "big.bin").unlink()
    report = apply_series(three.tree, base, three.patches())
    assert report.ok
    assert report.written == ("src/main.c", FILE)
    assert not (three.tree / "big.bin").exists()


def test_missing_blob_of_a_patched_file(three: Upstream) -> None:
    base = three.commit({FILE: three.read(FILE) + b"// tail\n"})
    oid = git(three.tree, "rev-parse", f"HEAD:{FILE}")
    (three.tree / ".git/objects" / oid[:2] / oid[2:]).unlink()
    report = try_series(three.tree, base, three.patches())
    assert report.patches[0].hunks[0].verdict is Verdict.FILE_GONE
    assert "lacks its content" in report.patches[0].hunks[0].detail


def test_executable_bit_survives(three: Upstream) -> None:
    (three.tree / FILE).chmod(0o755)
    base = three.commit({})
    apply_series(three.tree, base, three.patches())
    assert (three.tree / FILE).stat().st_mode & 0o111 == 0o111
    assert git(three.tree, "ls-tree", "HEAD", FILE).startswith("100755 ")


def test_linked_work_tree(three: Upstream, tmp_path: Path) -> None:
    """A second work tree of the same repository has its own idea of what was applied."""
    base = three.head()
    apply_series(three.tree, base, three.patches())
    other = tmp_path / "other"
    git(three.tree, "worktree", "add", "-q", "--detach", other, base)
    apply_series(other, base, three.patches()[:1])
    assert apply_series(three.tree, base, three.patches()).written == ()
    assert git(other, "status", "--porcelain") == ""


def test_two_at_once_are_refused(three: Upstream) -> None:
    import filelock

    (three.tree / ".kvpatch").mkdir()
    with filelock.FileLock(three.tree / ".kvpatch/lock"), pytest.raises(PatchError, match="another kvpatch"):
        apply_series(three.tree, three.head(), three.patches())


def test_tree_without_a_repository_of_its_own(three: Upstream) -> None:
    """A folder inside some other repository is not mistaken for that repository."""
    inner = three.tree / "inner"
    inner.mkdir()
    with pytest.raises(PatchError, match="has no commit"):
        apply_series(inner, "HEAD", three.patches())
    assert git(three.tree, "rev-parse", "--abbrev-ref", "HEAD") == "main"


def test_unknown_base(three: Upstream, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="has no commit"):
        apply_series(three.tree, "f" * 40, three.patches())
    with pytest.raises(PatchError, match="is not a directory"):
        try_series(tmp_path / "none", "HEAD", three.patches())


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> None:
    real = worktree.WorkTree._swap
    calls = 0

    def swap(self: worktree.WorkTree, number: int, path: str) -> None:
        nonlocal calls
        calls += 1
        if calls > count:
            act()
        real(self, number, path)

    monkeypatch.setattr(worktree.WorkTree, "_swap", swap)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1])
def test_interrupted_leaves_the_old_tree(
    three: Upstream, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    base = three.head()
    age(three.tree)
    before = snapshot(three.tree)
    with monkeypatch.context() as patch:
        interrupt_after(patch, after, raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            apply_series(three.tree, base, three.patches())
    assert snapshot(three.tree) == before
    assert three.head() == base
    assert git(three.tree, "status", "--porcelain") == ""
    assert apply_series(three.tree, base, three.patches()).ok


def test_interrupted_at_the_last_moment(three: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the index and HEAD."""
    base = three.head()
    before = snapshot(three.tree)
    real = worktree.Repository.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args[:2] == ("update-ref", "--no-deref"):
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(worktree.Repository, "run", run)
        with pytest.raises(KeyboardInterrupt):
            apply_series(three.tree, base, three.patches())
    assert snapshot(three.tree) == before
    assert git(three.tree, "status", "--porcelain") == ""


def test_killed_half_way_is_undone_at_the_next_start(three: Upstream) -> None:
    """A process that dies between two files leaves a journal; even a smaller series then starts from the
    old tree.
    """
    base = three.head()
    code = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[3])!r}]
from pathlib import Path
from kvpatch.patching import apply_series, load_series, worktree
real = worktree.WorkTree._swap
def swap(self, number, path):
    if number == 1:
        (self.root / ".git/index.lock").touch()
        os._exit(9)
    real(self, number, path)
worktree.WorkTree._swap = swap
apply_series(Path({str(three.tree)!r}), {base!r}, load_series(Path({str(three.series)!r})).patches)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert git(three.tree, "status", "--porcelain") == "M src/main.c"
    report: ApplyReport = apply_series(three.tree, base, three.patches()[:1])
    assert report.ok
    assert git(three.tree, "status", "--porcelain") == ""
    assert b"hook" not in three.read("src/main.c")
    assert not (three.tree / ".kvpatch/journal").exists()


def test_nothing_is_fetched_behind_our_back(three: Upstream, tmp_path: Path) -> None:
    """A partial clone would fetch what it lacks on its own; here only `fetch_base` may bring anything."""
    base = three.head()
    git(three.tree, "config", "uploadpack.allowFilter", "true")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--no-checkout", "--filter=blob:none", three.tree.as_uri(), clone)
    report = try_series(clone, base, three.patches())
    assert report.patches[0].hunks[0].verdict is Verdict.FILE_GONE
    assert "lacks its content" in report.patches[0].hunks[0].detail


def test_disk_full_is_called_that(three: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    base = three.head()
    before = snapshot(three.tree)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskFullError, match="No space left"):
            apply_series(three.tree, base, three.patches())
    assert snapshot(three.tree) == before
    assert apply_series(three.tree, base, three.patches()).ok


def test_git_without_room_is_called_that(three: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    base = three.head()
    real = Git.attempt

    def attempt(self: Git, *args: Any, **kwargs: Any) -> tuple[int, bytes, str]:
        if args[0] == "hash-object":
            return 128, b"", "fatal: write error: No space left on device"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Git, "attempt", attempt)
    with pytest.raises(DiskFullError, match="hash-object"):
        apply_series(three.tree, base, three.patches())
