"""The cache folder itself."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from kvpatch.errors import AccessError, DiskFullError, GitError, ToolchainError, guard
from kvpatch.gitrun import Git, init_repository, version
from kvpatch.sources import Store
from kvpatch.sources.errors import SourceError
from kvpatch.sources.layout import Layout

from .conftest import FAKE, FakeUpstream, Server, check_exact, fetch, run_as_nobody


def test_tag_and_parts(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    fetch(store, str(upstream.bare), upstream.pin("v0.1.0"), tmp_path / "tree")
    assert (
        (store.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    )
    assert not list((store.root / "incoming").iterdir())


def test_root_that_cannot_be(upstream: FakeUpstream, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/nowhere/cache")):
        for spec in (str(upstream.bare), server.url()):
            with pytest.raises(SourceError) as caught:
                Store(root).resolve(FAKE, spec, upstream.pin("v0.1.0"))
            assert caught.value.exit_code == 4
    assert (tmp_path / "file").read_text() == "x"


def test_root_without_permission(upstream: FakeUpstream, server: Server, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir(mode=0o755 if os.geteuid() == 0 else 0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and folder.stat().st_mode & 0o005 != 0o005 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)

    def attempt() -> None:
        Store(root).resolve(FAKE, server.url(), upstream.pin("v0.1.0"))

    if os.geteuid() == 0:
        assert run_as_nobody(attempt).startswith("AccessError: cannot ")
    else:
        with pytest.raises(AccessError):
            attempt()
        root.chmod(0o755)
    _, tree = fetch(Store(root), server.url(), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")


def test_disk_full_in_the_cache(upstream: FakeUpstream, server: Server, store: Store, tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import resource, sys; from pathlib import Path; from kvpatch.sources import *\n"
        "limit = int(sys.argv[5]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "up = Upstream(name='ollama', url=sys.argv[2]); s = Store(Path(sys.argv[1]))\n"
        "try:\n"
        "    s.materialize(s.resolve(up, None, Pin(ref='v0.1.0', commit=sys.argv[3])), Path(sys.argv[4]))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.exit_code, error)\n"
    )
    for limit in (100, 600, 100_000):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                str(store.root),
                server.url(),
                upstream.commits["v0.1.0"],
                str(tmp_path / "tree"),
                str(limit),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("DiskFullError 4 "), (limit, done.stdout)
    _, tree = fetch(store, server.url(), upstream.pin("v0.1.0"), tmp_path / "tree")
    check_exact(tree, upstream.bare, "v0.1.0")


def test_lock_waits_and_says_so(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    order: list[str] = []
    said: list[str] = []
    entered = threading.Event()

    def first() -> None:
        with Layout(layout.root).lock("x"):
            entered.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with layout.lock("x", said.append):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert said == ["waiting for another kvpatch that works on x"]


def test_sha256_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = layout.sha256(path)
    assert not (layout.root / "stamps").exists()  # too fresh to tell a change by its times
    time.sleep(2.1)
    assert layout.sha256(path) == first
    (stamp,) = (layout.root / "stamps").iterdir()
    path.write_bytes(b"two")
    assert layout.sha256(path) != first
    stamp.write_text("damaged")
    path.write_bytes(b"one")
    assert layout.sha256(path) == first
    with pytest.raises(SourceError):
        layout.sha256(tmp_path / "none")


def test_old_unfinished_folders_are_swept(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    layout.prepare()
    old, new = layout.root / "incoming/old", layout.root / "incoming/new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    with layout.incoming():
        pass
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (28, DiskFullError),
        (122, DiskFullError),
        (27, DiskFullError),
        (13, AccessError),
        (30, AccessError),
        (5, SourceError),
    ],
)
def test_guard(number: int, kind: type[SourceError]) -> None:
    with (
        pytest.raises(SourceError, match=r"cannot write the thing: .*/x") as caught,
        guard("write the thing", Path("/x")),
    ):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind


def test_git_absent_or_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import git

    assert version() >= (2, 31)
    with monkeypatch.context() as patch:
        patch.setattr(git.Git, "version_info", (2, 17, 1))
        with pytest.raises(ToolchainError, match=r"2\.17\.1 is too old"):
            version()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="not on PATH"):
        init_repository(tmp_path / "x", bare=True)


def test_git_that_ends_early_does_not_hang(tmp_path: Path) -> None:
    init_repository(tmp_path / "x.git", bare=True)

    def much(sink: object) -> None:
        for _ in range(100):
            sink.write(b"nonsense\n" * 100_000)  # type: ignore[attr-defined]

    with pytest.raises(GitError, match="Unsupported command"):
        Git(tmp_path / "x.git").feed("fast-import", "--quiet", write=much)
