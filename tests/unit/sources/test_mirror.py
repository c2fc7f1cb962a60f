"""Source from a repository on this machine, which must come out of it untouched."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvpatch.sources import Pin, Store
from kvpatch.sources.errors import MissingObjectsError, PinMismatchError, SpecError, UnknownRefError

from .conftest import FAKE, FakeUpstream, Server, check_exact, fetch, fingerprint, git, run_as_nobody, times


def loosen(repository: Path) -> None:
    """Unpack every object into a file of its own, so that single ones can be taken away."""
    for pack in (repository / "objects/pack").glob("*.pack"):
        moved = repository / pack.name
        pack.rename(moved)
        with moved.open("rb") as stream:
            subprocess.run(["git", "-C", str(repository), "unpack-objects", "-q"], stdin=stream, check=True)
        moved.unlink()
    for left in (repository / "objects/pack").iterdir():
        left.unlink()


def take(repository: Path, name: str) -> Path:
    """Remove one object; returns where it went, to put it back from."""
    loosen(repository)
    oid = git(repository, "rev-parse", name)
    path = repository / "objects" / oid[:2] / oid[2:]
    kept = repository.parent / f"taken-{oid}"
    path.rename(kept)
    return kept


def test_bare_mirror_is_untouched(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    before = fingerprint(upstream.bare)
    resolved, tree = fetch(store, str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree")
    assert (resolved.kind, resolved.location, resolved.date) == ("mirror", str(upstream.bare), "2026-08-18")
    check_exact(tree, upstream.bare, "v0.1.0")
    _, tree = fetch(store, str(upstream.bare), upstream.pin("v0.2.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.2.0")
    assert store.fetch_commit(tree, "v0.2.0-rc1")
    assert git(tree.path, "show", "v0.2.0-rc1:main.go") == "package main // rc"
    assert not store.fetch_commit(tree, "1" * 40)
    assert store.tags(FAKE, str(upstream.bare)) == ("v0.1.0", "v0.2.0-rc1", "v0.2.0")
    assert fingerprint(upstream.bare) == before
    assert not (store.root / "git").exists()


def test_mirror_on_read_only_files(upstream: FakeUpstream, tmp_path: Path) -> None:
    for path in [*upstream.bare.rglob("*"), upstream.bare]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = fingerprint(upstream.bare)
    try:
        if os.geteuid() == 0:  # modes do not bind root, so somebody else has to try
            ours = tmp_path / "nobody"
            ours.mkdir()
            os.chown(ours, 65534, 65534)
            for folder in (tmp_path, *tmp_path.parents):
                if (
                    folder.stat().st_uid == 0
                    and folder.stat().st_mode & 0o005 != 0o005
                    and str(folder).startswith("/tmp/")
                ):
                    folder.chmod(0o755)
            answer = run_as_nobody(
                lambda: fetch(Store(ours / "cache"), str(upstream.bare), upstream.pin("v0.1.0"), ours / "t")
            )
            assert answer == "done"
        _, tree = fetch(
            Store(tmp_path / "cache"), str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree"
        )
        check_exact(tree, upstream.bare, "v0.1.0")
        assert fingerprint(upstream.bare) == before
    finally:
        for path in [upstream.bare, *upstream.bare.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o444)


def test_files_the_mirror_lacks_are_left_out(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    kept = take(upstream.bare, "v0.1.0:big.dat")
    also = take(upstream.bare, "v0.1.0:docs/read me.txt")
    before = fingerprint(upstream.bare)
    said: list[str] = []
    resolved = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    tree = store.materialize(resolved, tmp_path / "tree", progress=said.append)
    assert tree.missing == ("big.dat", "docs/read me.txt")
    assert tree.key != resolved.key
    assert any("big.dat" in line for line in said)
    check_exact(tree, upstream.bare, "v0.1.0")
    assert fingerprint(upstream.bare) == before
    stood = times(tree.path)
    assert store.materialize(resolved, tmp_path / "tree") == tree
    (tree.path / "big.dat").write_text("made by hand")
    (tree.path / "main.go").write_text("edited")
    again = store.materialize(resolved, tmp_path / "tree")
    check_exact(again, upstream.bare, "v0.1.0")
    assert {k: v for k, v in times(tree.path).items() if k != "main.go"} == {
        k: v for k, v in stood.items() if k != "main.go"
    }
    # another release of the same mirror, with the same holes, then the mirror is repaired
    _, second = fetch(store, str(upstream.bare), upstream.pin("v0.2.0"), tmp_path / "tree")
    assert second.missing == tree.missing
    check_exact(second, upstream.bare, "v0.2.0")
    for path in (kept, also):
        oid = path.name.removeprefix("taken-")
        path.rename(upstream.bare / "objects" / oid[:2] / oid[2:])
    _, whole = fetch(store, str(upstream.bare), upstream.pin("v0.2.0"), tmp_path / "tree")
    assert whole.missing == ()
    assert whole.key == whole.base_commit
    check_exact(whole, upstream.bare, "v0.2.0")


def test_blob_filtered_clone_is_no_mirror(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    clone = tmp_path / "clone.git"
    git(tmp_path, "clone", "-q", "--bare", "--filter=blob:none", server.url(), str(clone))
    before, requests = fingerprint(clone), len(server.requests)
    resolved = store.resolve(FAKE, str(clone), upstream.pin("v0.1.0"))
    with pytest.raises(MissingObjectsError, match="blob-filtered clone") as caught:
        store.materialize(resolved, tmp_path / "tree")
    assert "URL" in (caught.value.hint or "")
    assert fingerprint(clone) == before  # nothing was fetched into the user's clone behind their back
    assert len(server.requests) == requests


@pytest.mark.parametrize("what", ["v0.1.0^{commit}", "v0.1.0^{tree}", "v0.1.0:docs"])
def test_mirror_that_lacks_what_is_needed(
    what: str, upstream: FakeUpstream, store: Store, tmp_path: Path
) -> None:
    kept = take(upstream.bare, what)
    with pytest.raises(MissingObjectsError):
        fetch(store, str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree")
    oid = kept.name.removeprefix("taken-")
    kept.rename(upstream.bare / "objects" / oid[:2] / oid[2:])
    _, tree = fetch(store, str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")


def test_repository_with_a_dirty_work_tree(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    (upstream.work / "main.go").write_text("not committed")
    (upstream.work / "untracked").write_text("x")
    before = fingerprint(upstream.work)
    said: list[str] = []
    resolved = store.resolve(FAKE, str(upstream.work), upstream.pin("v0.2.0"), progress=said.append)
    tree = store.materialize(resolved, tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.2.0")
    assert any("uncommitted files do not count" in line for line in said)
    assert fingerprint(upstream.work) == before


def test_linked_worktree_and_shared_clone(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    git(upstream.work, "worktree", "add", "-q", "--detach", str(tmp_path / "linked"), "v0.1.0")
    _, tree = fetch(store, str(tmp_path / "linked"), upstream.pin("v0.2.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.2.0")
    git(tmp_path, "clone", "-q", "--shared", "--bare", str(upstream.bare), str(tmp_path / "shared.git"))
    _, tree = fetch(store, str(tmp_path / "shared.git"), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")


def test_shallow_clone(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    git(
        tmp_path,
        "clone",
        "-q",
        "--depth=1",
        "--branch=v0.2.0",
        f"file://{upstream.bare}",
        str(tmp_path / "shallow"),
    )
    _, tree = fetch(store, str(tmp_path / "shallow"), upstream.pin("v0.2.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.2.0")
    assert git(tree.path, "log", "--format=%H") == tree.base_commit


def test_same_history_whatever_the_source(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    _, near = fetch(store, str(upstream.bare), upstream.pin("v0.2.0"), tmp_path / "near")
    _, far = fetch(store, server.url(), upstream.pin("v0.2.0"), tmp_path / "far")
    assert (near.base_commit, near.key) == (far.base_commit, far.key)
    for tree in (near, far):
        assert git(tree.path, "rev-list", "--count", "HEAD") == "1"


def test_names(upstream: FakeUpstream, store: Store) -> None:
    commit = upstream.commits["v0.1.0"]
    for ref in (commit, commit[:9]):
        assert store.resolve(FAKE, str(upstream.bare), Pin(ref=ref)).commit == commit
    assert store.resolve(FAKE, str(upstream.bare), Pin(ref="main")).commit == upstream.commits["v0.2.0"]
    # the tag was not copied, but the pinned commit was
    git(upstream.bare, "tag", "-d", "v0.1.0")
    assert store.resolve(FAKE, str(upstream.bare), Pin(ref="v0.1.0", commit=commit)).commit == commit
    with pytest.raises(UnknownRefError, match=r"it has 2 tags; nearest: v0\.2\.0"):
        store.resolve(FAKE, str(upstream.bare), Pin(ref="v0.1.0"))


def test_commit_is_not_the_pin(upstream: FakeUpstream, store: Store) -> None:
    with pytest.raises(PinMismatchError) as caught:
        store.resolve(FAKE, str(upstream.bare), Pin(ref="v0.1.0", commit=upstream.commits["v0.2.0"][:12]))
    assert caught.value.data == {
        "expected": upstream.commits["v0.2.0"][:12],
        "actual": upstream.commits["v0.1.0"],
        "ref": "v0.1.0",
        "location": str(upstream.bare),
    }


def test_mirror_that_vanished_or_is_broken(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    resolved = store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    (upstream.bare / "config").write_text("[core\nbroken")
    with pytest.raises(SpecError, match="git cannot read it"):
        store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    shutil.rmtree(upstream.bare)
    with pytest.raises(SpecError):
        store.materialize(resolved, tmp_path / "tree")
    with pytest.raises(SpecError, match="there is no") as caught:
        store.resolve(FAKE, str(upstream.bare), upstream.pin("v0.1.0"))
    assert "--ollama-source" in (caught.value.hint or "")


def test_other_object_format(store: Store, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--object-format=sha256", str(tmp_path / "new"))
    with pytest.raises(SpecError, match="sha256"):
        store.resolve(FAKE, str(tmp_path / "new"), Pin(ref="v1"))


def test_programs_named_by_a_mirror_do_not_run(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    trap.chmod(0o755)
    for name in (
        "core.fsmonitor",
        "core.sshCommand",
        "core.pager",
        "core.alternateRefsCommand",
        "uploadpack.packObjectsHook",
    ):
        git(upstream.bare, "config", name, str(trap))
    (upstream.bare / "hooks").mkdir(exist_ok=True)
    for hook in ("post-checkout", "reference-transaction", "post-index-change"):
        shutil.copy(trap, upstream.bare / "hooks" / hook)
    _, tree = fetch(store, str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")
    assert not (tmp_path / "sprung").exists()
