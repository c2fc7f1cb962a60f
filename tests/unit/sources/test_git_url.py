"""Source from a git URL, against git's own server program on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvpatch.errors import SourceError
from kvpatch.sources import Pin, Store
from kvpatch.sources.errors import NetworkError, PinMismatchError, SpecError, UnknownRefError
from kvpatch.sources.remote import is_url, redacted

from .conftest import FAKE, LLAMA, FakeUpstream, Server, check_exact, fetch, git


def cached_repository(store: Store) -> Path:
    (found,) = (store.root / "git").glob("*.git")
    return found


def objects(repository: Path) -> set[str]:
    lines = git(repository, "cat-file", "--batch-all-objects", "--batch-check").splitlines()
    return {line.split()[0] for line in lines}


def test_shallow_filtered_then_blobs_on_demand(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    resolved = store.resolve(FAKE, server.url(), upstream.pin("v0.1.0"))
    commit = upstream.commits["v0.1.0"]
    assert (resolved.kind, resolved.commit, resolved.key) == ("git", commit, commit)
    assert resolved.date == "2026-08-18"
    assert resolved.verified
    cache = cached_repository(store)
    assert (cache / "shallow").read_text().split() == [resolved.commit]
    assert upstream.blob("v0.1.0", "big.dat") not in objects(cache)  # no file contents yet
    tree = store.materialize(resolved, tmp_path / "tree")
    assert upstream.blob("v0.1.0", "big.dat") in objects(cache)
    check_exact(tree, upstream.bare, "v0.1.0")
    assert (tree.base_commit, tree.upstream_commit, tree.missing) == (resolved.commit, resolved.commit, ())


def test_second_release_brings_only_what_is_new(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "tree")
    before = objects(cached_repository(store))
    _, tree = fetch(store, server.url(), upstream.pin("v0.2.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.2.0")
    new = objects(cached_repository(store)) - before
    blobs = {upstream.blob("v0.2.0", path) for path in ("main.go", "docs/new.txt")}
    assert blobs <= new
    # commit, tag, root tree, docs tree and the two files; the packs may repeat nothing of the first release
    assert len(new) == 6


def test_pinned_and_cached_needs_no_network(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "one")
    count = len(server.requests)
    server.status = 500
    _, tree = fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "two")
    check_exact(tree, upstream.bare, "v0.1.0")
    assert len(server.requests) == count


def test_unpinned_tag_is_used_as_fetched_before_when_offline(
    upstream: FakeUpstream, server: Server, store: Store
) -> None:
    first = store.resolve(FAKE, server.url(), Pin(ref="v0.1.0"))
    assert not first.verified
    server.status = 503
    said: list[str] = []
    assert store.resolve(FAKE, server.url(), Pin(ref="v0.1.0"), progress=said.append) == first
    assert any("as fetched before" in line for line in said)


def test_unpinned_branch_follows_the_server(upstream: FakeUpstream, server: Server, store: Store) -> None:
    assert store.resolve(FAKE, server.url(), Pin(ref="main")).commit == upstream.commits["v0.2.0"]
    newer = upstream.release("v0.3.0", {"main.go": "three\n"})
    assert store.resolve(FAKE, server.url(), Pin(ref="main")).commit == newer


def test_commit_whole_and_shortened(upstream: FakeUpstream, server: Server, store: Store) -> None:
    commit = upstream.commits["v0.1.0"]
    assert store.resolve(FAKE, server.url(), Pin(ref=commit)).commit == commit
    assert store.resolve(FAKE, server.url(), Pin(ref=commit[:9])).commit == commit
    untagged = upstream.commits["v0.2.0-rc1"]
    git(upstream.bare, "tag", "-d", "v0.2.0-rc1")
    assert store.resolve(FAKE, server.url(), Pin(ref=untagged[:9], commit=untagged)).commit == untagged


def test_annotated_tag_is_peeled(upstream: FakeUpstream, server: Server, store: Store) -> None:
    assert store.resolve(FAKE, server.url(), upstream.pin("v0.2.0")).commit == upstream.commits["v0.2.0"]


def test_tags(upstream: FakeUpstream, server: Server, store: Store) -> None:
    assert store.tags(FAKE, server.url()) == ("v0.1.0", "v0.2.0-rc1", "v0.2.0")


@pytest.mark.parametrize("cut", [0, 400, 5_000, 200_000])
def test_dropped_connection(
    cut: int, upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    if cut < 1000:  # the fetch of commit and trees
        server.cut_after = cut
        with pytest.raises(
            NetworkError, match=r"cannot fetch v0\.1\.0 of ollama from http://127\.0\.0\.1"
        ) as caught:
            store.resolve(FAKE, server.url(), upstream.pin("v0.1.0"))
        assert "--ollama-source" in (caught.value.hint or "")
    resolved = store.resolve(FAKE, server.url(), upstream.pin("v0.1.0"))
    server.cut_after = cut
    with pytest.raises(NetworkError):
        store.materialize(resolved, tmp_path / "tree")
    git(cached_repository(store), "fsck", "--connectivity-only", "--no-dangling")
    assert not list(cached_repository(store).glob("objects/pack/tmp_*"))
    check_exact(store.materialize(resolved, tmp_path / "tree"), upstream.bare, "v0.1.0")


def test_connection_refused(store: Store) -> None:
    with pytest.raises(NetworkError, match=r"http://127\.0\.0\.1:9/x\.git") as caught:
        store.resolve(FAKE, "http://127.0.0.1:9/x.git", Pin(ref="v0.1.0"))
    assert caught.value.exit_code == 4
    assert "--ollama-source PATH" in (caught.value.hint or "")
    with pytest.raises(NetworkError) as caught:
        store.resolve(LLAMA, None, Pin(ref="b1"))
    assert "--llama-cpp-source PATH, or sdist" in (caught.value.hint or "")


@pytest.mark.parametrize(("status", "kind"), [(500, NetworkError), (401, NetworkError), (404, SpecError)])
def test_http_errors(status: int, kind: type[SourceError], server: Server, store: Store) -> None:
    server.status = status
    with pytest.raises(kind):
        store.resolve(FAKE, server.url(), Pin(ref="v0.1.0"))


def test_unknown_tag_says_what_exists(upstream: FakeUpstream, server: Server, store: Store) -> None:
    with pytest.raises(
        UnknownRefError, match=r"no ollama v9\.9\.9: it has 3 tags; nearest: v0\.2\.0, v0\.1\.0"
    ) as caught:
        store.resolve(FAKE, server.url(), Pin(ref="v9.9.9"))
    assert caught.value.data["count"] == 3
    assert "v0.2.0" in (caught.value.hint or "")
    absent = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(UnknownRefError):
        store.resolve(FAKE, server.url(), Pin(ref=absent))
    check = store.resolve(FAKE, server.url(), upstream.pin("v0.1.0"))
    assert check.commit == upstream.commits["v0.1.0"]


def test_moved_tag_is_not_the_pin(upstream: FakeUpstream, server: Server, store: Store) -> None:
    wrong = upstream.commits["v0.2.0"]
    with pytest.raises(PinMismatchError) as caught:
        store.resolve(FAKE, server.url(), Pin(ref="v0.1.0", commit=wrong))
    assert wrong in str(caught.value)
    assert upstream.commits["v0.1.0"] in str(caught.value)
    assert caught.value.data["expected"] == wrong
    # once upstream puts the tag right, the cached one does not stand in the way
    git(upstream.bare, "tag", "-f", "v0.1.0", wrong)
    assert store.resolve(FAKE, server.url(), Pin(ref="v0.1.0", commit=wrong)).commit == wrong


def test_pin_prefix(upstream: FakeUpstream, server: Server, store: Store) -> None:
    commit = upstream.commits["v0.1.0"]
    assert store.resolve(FAKE, server.url(), Pin(ref="v0.1.0", commit=commit[:9])).verified
    for bad in (commit[:8], "", "xyzxyzxyz", commit + "0"):
        with pytest.raises(SourceError, match="9 to 40 hex"):
            store.resolve(FAKE, server.url(), Pin(ref="v0.1.0", commit=bad))


def test_base_commit_of_a_patch(upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path) -> None:
    between = upstream.commits["v0.2.0-rc1"]
    git(upstream.bare, "tag", "-d", "v0.2.0-rc1")  # no ref names it any more; main's history still has it
    _, tree = fetch(store, server.url(), upstream.pin("v0.2.0"), tmp_path / "tree")
    blob = git(upstream.work, "rev-parse", f"{between}:main.go")
    assert (
        subprocess.run(["git", "-C", str(tree.path), "cat-file", "-e", blob], capture_output=True).returncode
        != 0
    )
    assert store.fetch_commit(tree, between)
    assert git(tree.path, "cat-file", "blob", blob) == "package main // rc"
    assert git(tree.path, "log", "--format=%H", between) == between
    check_exact(tree, upstream.bare, "v0.2.0")
    count = len(server.requests)
    assert store.fetch_commit(tree, between)
    assert len(server.requests) == count
    assert store.fetch_commit(tree, "v0.1.0")  # by name: the tree then knows the name
    assert git(tree.path, "show", "v0.1.0:mixed.txt").startswith("one")
    assert not store.fetch_commit(tree, "f" * 40)
    assert not store.fetch_commit(tree, "v7")
    server.status = 500
    said: list[str] = []
    assert not store.fetch_commit(tree, "e" * 40, progress=said.append)
    assert "not to be had" in said[-1]


def test_server_without_filter(upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path) -> None:
    git(upstream.bare, "config", "uploadpack.allowFilter", "false")
    _, tree = fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")


def test_server_that_lacks_contents(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    resolved = store.resolve(FAKE, server.url(), upstream.pin("v0.1.0"))
    for pack in (upstream.bare / "objects/pack").glob("*"):
        pack.unlink()
    oid = upstream.blob("v0.1.0", "big.dat")
    (upstream.bare / "objects" / oid[:2] / oid[2:]).unlink()
    with pytest.raises(SourceError) as caught:
        store.materialize(resolved, tmp_path / "tree")
    assert caught.value.exit_code == 4


def test_two_builds_at_once(upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from kvpatch.sources import *\n"
        "up = Upstream(name='ollama', url=sys.argv[2]); s = Store(Path(sys.argv[1]))\n"
        "for ref, commit, dest in zip(*[iter(sys.argv[3:])] * 3):\n"
        "    s.materialize(s.resolve(up, None, Pin(ref=ref, commit=commit)), Path(dest))\n"
    )
    jobs = []
    for number, order in enumerate((("v0.1.0", "v0.2.0"), ("v0.2.0", "v0.1.0"), ("v0.1.0", "v0.2.0"))):
        args = [
            word for tag in order for word in (tag, upstream.commits[tag], str(tmp_path / f"{number}-{tag}"))
        ]
        jobs.append(
            subprocess.Popen(
                [sys.executable, "-c", script, str(store.root), server.url(), *args],
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for job in jobs:
        _, stderr = job.communicate(timeout=60)
        assert job.returncode == 0, stderr
    for number in range(3):
        for tag in ("v0.1.0", "v0.2.0"):
            again = store.materialize(
                store.resolve(FAKE, server.url(), upstream.pin(tag)), tmp_path / f"{number}-{tag}"
            )
            check_exact(again, upstream.bare, tag)


def test_two_threads_one_destination(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    failures: list[BaseException] = []

    def build() -> None:
        try:
            fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "tree")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("step", ["resolve", "materialize"])
def test_killed_half_way(
    step: str, upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    if step == "materialize":
        store.resolve(FAKE, server.url(), upstream.pin("v0.1.0"))
    server.stall_after = 300 if step == "resolve" else 50_000
    script = (
        "import sys; from pathlib import Path; from kvpatch.sources import *\n"
        "up = Upstream(name='ollama', url=sys.argv[2]); s = Store(Path(sys.argv[1]))\n"
        "s.materialize(s.resolve(up, None, Pin(ref='v0.1.0', commit=sys.argv[3])), Path(sys.argv[4]))\n"
    )
    job = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            str(store.root),
            server.url(),
            upstream.commits["v0.1.0"],
            str(tmp_path / "tree"),
        ],
        start_new_session=True,
    )
    assert server.stalled.wait(30)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    for name in (
        "shallow.lock",
        "config.lock",
        "objects/pack/tmp_pack_left",
    ):  # as if it had died a moment elsewhere
        (cached_repository(store) / name).write_text("")
    _, tree = fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")
    assert not list(cached_repository(store).rglob("*.lock"))
    assert not list(cached_repository(store).rglob("tmp_*"))


def test_nothing_of_the_caller_steers_git(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    hooks = tmp_path / "templates" / "hooks"
    hooks.mkdir(parents=True)
    (home / ".config/git").mkdir(parents=True)
    (home / ".config/git/attributes").write_text("* text eol=crlf\n")
    (home / ".config/git/ignore").write_text("*\n")
    (hooks / "post-checkout").write_text("#!/bin/sh\ntouch " + str(tmp_path / "hook-ran") + "\n")
    (hooks / "post-checkout").chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[core]\n autocrlf = true\n hooksPath = {hooks}\n[init]\n templateDir = {hooks.parent}\n"
        '[url "http://127.0.0.1:9/"]\n insteadOf = http://\n[filter "lfs"]\n smudge = false\n required = true\n'
    )
    for name, value in (
        ("HOME", str(home)),
        ("GIT_DIR", "/nonexistent"),
        ("GIT_WORK_TREE", "/"),
        ("GIT_INDEX_FILE", "/x"),
        ("GIT_CONFIG_PARAMETERS", "'core.autocrlf'='true'"),
        ("GIT_TEMPLATE_DIR", str(hooks.parent)),
    ):
        monkeypatch.setenv(name, value)
    _, tree = fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")
    assert not (tmp_path / "hook-ran").exists()
    assert not (tree.path / ".git/hooks").exists()


def test_credentials_are_written_nowhere(
    upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path
) -> None:
    url = server.url().replace("http://", "http://user:s3cret-token@")
    said: list[str] = []
    resolved = store.resolve(FAKE, url, upstream.pin("v0.1.0"), progress=said.append)
    tree = store.materialize(resolved, tmp_path / "tree", progress=said.append)
    assert resolved.location == server.url()
    for folder in (store.root, tree.path):
        for path in folder.rglob("*"):
            assert not path.is_file() or b"s3cret" not in path.read_bytes(), path
    assert "s3cret" not in "".join(said) + repr(resolved)
    server.status = 500
    with pytest.raises(NetworkError) as caught:
        store.resolve(FAKE, url, Pin(ref="v0.2.0"))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["ext::sh -c id", "-u./x://y", "gopher://x/y", "--upload-pack=id://x"])
def test_urls_that_are_refused(url: str, store: Store) -> None:
    with pytest.raises(SpecError):
        store.resolve(FAKE, url, Pin(ref="v0.1.0"))


@pytest.mark.parametrize("ref", ["", "-x", "a b", "a..b", "a^{commit}", "x.lock", "refs/../x", "a:b"])
def test_refs_that_are_refused(ref: str, server: Server, store: Store) -> None:
    with pytest.raises(SpecError, match="cannot be the name"):
        store.resolve(FAKE, server.url(), Pin(ref=ref))


def test_archive_address_is_refused(store: Store) -> None:
    with pytest.raises(SpecError, match="address of an archive") as caught:
        store.resolve(FAKE, "https://example.invalid/v1.tar.gz", Pin(ref="v1"))
    assert "download it" in (caught.value.hint or "")


def test_what_is_a_url() -> None:
    assert is_url("https://host/x")
    assert is_url("git@host:owner/x.git")
    assert not is_url("/some/path")
    assert not is_url("./relative")
    assert redacted("https://u:p@host:8/x") == "https://host:8/x"
    assert redacted("ssh://git:p@host/x") == "ssh://git@host/x"
    assert redacted("git@host:x") == "git@host:x"
