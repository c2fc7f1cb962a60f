"""Archives and folders: what is taken, and everything that is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpatch.errors import DiskFullError, SourceError
from kvpatch.sources import Pin, Store, archive
from kvpatch.sources.errors import CorruptArchiveError, PinMismatchError, SpecError, UnsafeArchiveError

from .conftest import FAKE, FakeUpstream, check_exact, fetch, fingerprint, git, times

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"", **fields: object) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(path: Path, *entries: Entry, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as made:
        for info, content in entries:
            made.addfile(info, io.BytesIO(content))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["tar.gz", "tar", "zip", "tar.xz", "tar.bz2"])
def test_archive_of_a_release(form: str, upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    path = tmp_path / f"ollama-0.1.0.{form}"
    plain = form if form in ("tar.gz", "zip") else "tar"
    # Attributes off, so that the packer puts the files in as they are.
    (upstream.bare / "info").mkdir(exist_ok=True)
    (upstream.bare / "info/attributes").write_text("* -text !eol !filter !ident !working-tree-encoding\n")
    git(upstream.bare, "archive", f"--format={plain}", "--prefix=ollama-0.1.0/", f"--output={path}", "v0.1.0")
    if form in ("tar.xz", "tar.bz2"):
        import bz2
        import lzma

        path.write_bytes((lzma if form == "tar.xz" else bz2).compress(path.read_bytes()))
    pin = Pin(ref="v0.1.0", commit=upstream.commits["v0.1.0"], sha256=sha256(path), date="2026-08-18")
    resolved, tree = fetch(store, str(path), pin, tmp_path / "tree")
    assert (resolved.kind, resolved.verified, resolved.commit) == (
        "archive",
        True,
        upstream.commits["v0.1.0"],
    )
    assert resolved.key == f"sha256:{pin.sha256}"
    check_exact(tree, upstream.bare, "v0.1.0")
    assert git(tree.path, "rev-parse", "HEAD^{tree}") == git(upstream.bare, "rev-parse", "v0.1.0^{tree}")
    assert git(tree.path, "log", "-1", "--format=%an <%ae> %ad|%s", "--date=iso-strict") == (
        "kvpatch <kvpatch@localhost> 2026-08-18T00:00:00+00:00|ollama v0.1.0"
    )
    # the same archive is the same commit on another machine
    _, other = fetch(Store(tmp_path / "other"), str(path), pin, tmp_path / "other-tree")
    assert other.base_commit == tree.base_commit


def test_commit_written_by_git_archive_is_compared(
    upstream: FakeUpstream, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "x.tar.gz"
    git(upstream.bare, "archive", "--format=tar.gz", f"--output={path}", "v0.1.0")
    assert store.resolve(FAKE, str(path), Pin(ref="v0.1.0")).commit == upstream.commits["v0.1.0"]
    assert not store.resolve(FAKE, str(path), Pin(ref="v0.1.0", commit=upstream.commits["v0.1.0"])).verified
    with pytest.raises(PinMismatchError):
        store.resolve(FAKE, str(path), Pin(ref="v0.1.0", commit=upstream.commits["v0.2.0"]))


def test_other_sha256_or_tree_than_the_pin(store: Store, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar.gz", entry("top/a.c", b"int a;"))
    with pytest.raises(PinMismatchError) as caught:
        store.resolve(FAKE, str(path), Pin(ref="v1", sha256="0" * 64))
    assert caught.value.data == {"expected": "0" * 64, "actual": sha256(path)}
    assert "0" * 64 in str(caught.value)
    assert sha256(path) in str(caught.value)
    resolved, tree = fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")
    name = git(tree.path, "rev-parse", "HEAD^{tree}")
    assert store.materialize(store.resolve(FAKE, str(path), Pin(ref="v1", tree=name)), tree.path) == tree
    with pytest.raises(PinMismatchError, match="are tree"):
        store.materialize(store.resolve(FAKE, str(path), Pin(ref="v1", tree="1" * 40)), tree.path)
    assert resolved.verified is False


def test_files_links_and_modes(store: Store, tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar.gz",
        entry("./top", type=tarfile.DIRTYPE),
        entry("./top/bin/tool", b"#!", mode=0o755),
        entry("./top/bin/again", type=tarfile.LNKTYPE, linkname="./top/bin/tool"),
        entry("./top/lib/up", type=tarfile.SYMTYPE, linkname="../bin/tool"),
        entry('./top/"quoted" name', b"q"),
        entry("./top/ü/ß", "ü".encode()),
        entry("./top/.git/config", b"[core]"),
        entry("./top/sub/.git", b"gitdir: ../.git/modules/sub"),
        entry("./top/empty", b""),
    )
    _, tree = fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")
    assert set(times(tree.path)) == {"bin/tool", "bin/again", "lib/up", '"quoted" name', "ü/ß", "empty"}
    assert (tree.path / "bin/again").read_bytes() == b"#!"
    assert os.access(tree.path / "bin/again", os.X_OK)
    assert (tree.path / "lib/up").resolve() == tree.path / "bin/tool"


def test_no_single_top_folder(store: Store, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", entry("a/x", b"1"), entry("b", b"2"), mode="w")
    _, tree = fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")
    assert set(times(tree.path)) == {"a/x", "b"}


HOSTILE = {
    "climbs out": (entry("top/ok", b"1"), entry("top/../../evil", b"x")),
    "absolute": (entry("/tmp/evil", b"x"),),
    "drive": (entry("C:/evil", b"x"),),
    "backslash": (entry("top\\..\\evil", b"x"),),
    "newline": (entry("top/a\nb", b"x"),),
    "link out": (entry("top/l", type=tarfile.SYMTYPE, linkname="../../etc"),),
    "absolute link": (entry("top/l", type=tarfile.SYMTYPE, linkname="/etc/passwd"),),
    "link through a link": (
        entry("top/d", type=tarfile.SYMTYPE, linkname="."),
        entry("top/l", type=tarfile.SYMTYPE, linkname="d/d/../../.."),
    ),
    "under a link": (entry("top/d", type=tarfile.SYMTYPE, linkname="sub"), entry("top/d/evil", b"x")),
    "under a file": (entry("top/d", b"file"), entry("top/d/evil", b"x")),
    "file over folder": (entry("top/d/x", b"x"), entry("top/d", b"file")),
    "twice": (entry("top/a", b"1"), entry("top/./a", b"2")),
    "hard link out": (entry("top/l", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),),
    "hard link to absolute": (entry("top/l", type=tarfile.LNKTYPE, linkname="/etc/passwd"),),
    "hard link to nothing": (entry("top/l", type=tarfile.LNKTYPE, linkname="top/none"),),
    "hard link to link": (
        entry("top/s", type=tarfile.SYMTYPE, linkname="x"),
        entry("top/l", type=tarfile.LNKTYPE, linkname="top/s"),
    ),
    "device": (entry("top/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),),
    "block device": (entry("top/sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0),),
    "pipe": (entry("top/p", type=tarfile.FIFOTYPE),),
    "folder out": (entry("../x", type=tarfile.DIRTYPE), entry("top/a", b"1")),
    "long name": (entry("top/" + "a" * 2000, b"x"),),
    "empty link": (entry("top/l", type=tarfile.SYMTYPE, linkname=""),),
    "link out after the top is removed": (
        entry("top/sub/l", type=tarfile.SYMTYPE, linkname="../../x"),
        entry("top/a", b"1"),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tar(name: str, store: Store, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    path = tar(tmp_path / "x.tar.gz", *HOSTILE[name])
    outside = fingerprint(room)
    with pytest.raises(UnsafeArchiveError, match=r"x\.tar\.gz is refused") as caught:
        fetch(store, str(path), Pin(ref="v1"), room / "tree")
    assert caught.value.exit_code == 4
    assert caught.value.hint
    shutil.rmtree(room / "tree")  # empty, or git's; it holds no file of the archive
    assert fingerprint(room) == outside
    assert not Path("/tmp/evil").exists()
    good = tar(tmp_path / "good.tar.gz", entry("top/a", b"1"))
    _, tree = fetch(store, str(good), Pin(ref="v1"), room / "tree")  # the cache is still good
    assert set(times(tree.path)) == {"a"}


def zipped(path: Path, **members: tuple[bytes, int]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, (content, mode) in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(info, content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "mode"),
    [
        ("../evil", b"x", 0o100644),
        ("/evil", b"x", 0o100644),
        ("top/l", b"/etc/passwd", 0o120777),
        ("top/l", b"../../x", 0o120777),
        ("top/p", b"", stat.S_IFIFO | 0o644),
        ("top/l", b"x" * 5000, 0o120777),
    ],
)
def test_hostile_zip(name: str, content: bytes, mode: int, store: Store, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", **{name: (content, mode)})
    with pytest.raises(UnsafeArchiveError):
        fetch(store, str(path), Pin(ref="v1"), tmp_path / "room/tree")
    assert not (tmp_path / "evil").exists()


def test_zip_links_and_modes(store: Store, tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "x.zip",
        **{"top/": (b"", 0o40755), "top/run": (b"#!", 0o100755), "top/l": (b"run", 0o120777)},
    )
    _, tree = fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")
    assert (tree.path / "l").read_bytes() == b"#!"
    assert os.access(tree.path / "run", os.X_OK)


@pytest.mark.parametrize("form", ["members", "bytes", "lying size", "zip", "header"])
def test_bombs(form: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL", 1_000_000)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 50)
    path = tmp_path / "x.tar.gz"
    if form == "members":
        tar(path, *(entry(f"top/{n}", b"") for n in range(60)))
    elif form == "bytes":
        tar(path, *(entry(f"top/{n}", bytes(100_000)) for n in range(20)))
    elif form == "zip":
        path = zipped(tmp_path / "x.zip", **{f"top/{n}": (bytes(200_000), 0o100644) for n in range(20)})
    elif form == "header":  # an extended header of many megabytes, which is no member at all
        tar(path, entry("top/x", b"", pax_headers={"comment": "a" * 3_000_000}))
    else:
        info, _ = entry("top/x")
        info.size = 1 << 50
        path.write_bytes(gzip.compress(info.tobuf() + bytes(2048)))
    with pytest.raises(UnsafeArchiveError, match="expands to more than"):
        fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, flip, garbage, nothing])
@pytest.mark.parametrize("form", ["tar.gz", "tar.xz", "tar.bz2", "zip"])
def test_damaged(form: str, harm: Callable[[Path], None], store: Store, tmp_path: Path) -> None:
    path = tmp_path / f"x.{form}"
    content = os.urandom(40_000)
    if form == "zip":
        zipped(path, **{f"top/{n}": (content, 0o100644) for n in range(4)})
    else:
        tar(path, *(entry(f"top/{n}", content) for n in range(4)), mode=f"w:{form[4:]}")
    whole = path.read_bytes()
    harm(path)
    with pytest.raises(CorruptArchiveError, match=f"x.{form}"):
        fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")
    assert not list(store.root.rglob("tmp_*"))
    path.write_bytes(whole)
    _, tree = fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")
    assert (tree.path / "3").read_bytes() == content


def test_plain_tar_cut_between_members(store: Store, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", entry("top/a", bytes(5000)), entry("top/b", bytes(5000)), mode="w")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CorruptArchiveError):
        fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")


def test_encrypted_zip(store: Store, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", **{"top/a": (b"1", 0o100644)})
    data = path.read_bytes()
    place = data.index(b"PK\x01\x02")
    path.write_bytes(data[:6] + b"\x01\x00" + data[8 : place + 8] + b"\x01\x00" + data[place + 10 :])
    with pytest.raises(CorruptArchiveError, match="encrypted"):
        fetch(store, str(path), Pin(ref="v1"), tmp_path / "tree")


def test_empty_archive_and_other_files(store: Store, tmp_path: Path) -> None:
    with pytest.raises(CorruptArchiveError, match="no files"):
        fetch(store, str(tar(tmp_path / "x.tar.gz")), Pin(ref="v1"), tmp_path / "tree")
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(SpecError, match="no archive kvpatch reads"):
        store.resolve(FAKE, str(tmp_path / "note.txt"), Pin(ref="v1"))


def test_archive_exchanged_in_between(store: Store, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar.gz", entry("top/a", b"1"))
    resolved = store.resolve(FAKE, str(path), Pin(ref="v1"))
    tar(path, entry("top/a", b"2"))
    with pytest.raises(CorruptArchiveError, match="changed while"):
        store.materialize(resolved, tmp_path / "tree")


def test_disk_full_while_importing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "x.tar.gz", entry("top/a", b"1"))
    resolved = store.resolve(FAKE, str(path), Pin(ref="v1"))
    reads = archive.io.BufferedReader.read

    class Full(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(archive, "_expanded", lambda *_: Full())
        with pytest.raises(DiskFullError, match="No space left"):
            store.materialize(resolved, tmp_path / "tree")
    assert reads is archive.io.BufferedReader.read
    assert set(times(store.materialize(resolved, tmp_path / "tree").path)) == {"a"}


# --- folders without git -------------------------------------------------------------------------------------------


def test_folder_is_taken_as_it_is(upstream: FakeUpstream, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(upstream.work, folder, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    name = git(upstream.bare, "rev-parse", "v0.2.0^{tree}")
    before = fingerprint(folder)
    pin = Pin(ref="v0.2.0", commit=upstream.commits["v0.2.0"], tree=name)
    resolved, tree = fetch(store, str(folder), pin, tmp_path / "tree")
    assert (resolved.kind, resolved.key, resolved.verified) == ("path", f"tree:{name}", True)
    assert not store.resolve(FAKE, str(folder), upstream.pin("v0.2.0")).verified
    check_exact(tree, upstream.bare, "v0.2.0")
    assert fingerprint(folder) == before
    (folder / "main.go").write_text("mine\n")
    (folder / "docs/new.txt").unlink()
    (folder / "docs").rename(folder / "papers")
    (folder / "docs").write_text("now a file")
    (folder / "sub/.git").mkdir(parents=True)
    (folder / "sub/.git/HEAD").write_text("ref: x")
    (folder / "sub/file").write_text("of another repository")
    stood = times(tree.path)
    with pytest.raises(PinMismatchError, match="are tree"):
        store.resolve(FAKE, str(folder), pin)
    _, tree = fetch(store, str(folder), Pin(ref="v0.2.0"), tmp_path / "tree")
    now = times(tree.path)
    assert (tree.path / "docs").read_text() == "now a file"
    assert (tree.path / "sub/file").exists()
    assert now["big.dat"] == stood["big.dat"]
    assert set(now) == set(stood) - {"docs/read me.txt", "docs/new.txt"} | {
        "papers/read me.txt",
        "docs",
        "sub/file",
    }


@pytest.mark.parametrize("what", ["pipe", "link out", "absolute link"])
def test_folder_with_what_is_no_source(what: str, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "a").write_text("1")
    if what == "pipe":
        os.mkfifo(folder / "p")
    else:
        (folder / "l").symlink_to("../x" if what == "link out" else "/etc/passwd")
    with pytest.raises(UnsafeArchiveError):
        store.resolve(FAKE, str(folder), Pin(ref="v1"))


def test_folder_that_changes_or_is_empty(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    with pytest.raises(SpecError, match="holds no files"):
        store.resolve(FAKE, str(folder), Pin(ref="v1"))
    (folder / "a").write_text("1")
    resolved = store.resolve(FAKE, str(folder), Pin(ref="v1"))
    (folder / "a").write_text("22")
    with pytest.raises(SourceError, match="changed while"):
        store.materialize(resolved, tmp_path / "tree")
