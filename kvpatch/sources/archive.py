"""Reading archives that nobody vouches for.

Members are handed out one by one and never extracted here: what reads them puts them into git's object store,
so no member can name a place in the file system. Even so every member must be fit for a work tree; an archive
with one that is not is refused as a whole.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from kvpatch.errors import guard
from kvpatch.sources.errors import CorruptArchiveError, UnsafeArchiveError

MAX_TOTAL = 2 << 30  # bytes after decompression; llama.cpp's source distribution has 0.3 GiB
MAX_MEMBERS = 200_000
MAX_NAME = 1024  # bytes; names longer than this are no source files
SUFFIXES = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar", ".zip")

_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    OSError,
    NotImplementedError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """An entry of an archive.

    What `members` hands out are files, symbolic links and hard links; `path` is relative and clean; `content`
    can be read once, until the next member is asked for; a hard link has the path of its `target` and no
    content.
    """

    path: str
    kind: Literal["file", "executable", "symlink", "hardlink", "folder", "special"]
    size: int
    content: IO[bytes]
    target: str = ""


def is_archive(path: Path) -> bool:
    """Whether a file name says that it is an archive of a kind read here."""
    return path.name.lower().endswith(SUFFIXES)


@contextlib.contextmanager
def members(stream: IO[bytes], name: str) -> Iterator[Iterator[Member]]:
    """The members of an archive, in its order. `name` is the file's, for its suffix and for messages.

    Raises UnsafeArchiveError for a member that is absolute, climbs out, lies under a link, is a device, pipe
    or socket, occurs twice, or links outside, and for more than MAX_TOTAL bytes or MAX_MEMBERS members;
    CorruptArchiveError for an archive that is cut short or damaged, when the damage is met.
    """
    # Damage shows where data is read, which is in this block as often as in the generators below.
    with contextlib.ExitStack() as stack, _damage(name):
        source = _zip(stream) if name.lower().endswith(".zip") else _tar(stream, name, stack)
        with contextlib.closing(source):
            yield _checked(source, name)


def comment(stream: IO[bytes], name: str) -> str:
    """The commit that `git archive` wrote into an archive's header, or "".

    A claim, not a proof. Rewinds the stream.
    """
    found = ""
    with (
        contextlib.suppress(*_BROKEN, UnsafeArchiveError, CorruptArchiveError),
        contextlib.ExitStack() as stack,
    ):
        if name.lower().endswith(".zip"):
            with zipfile.ZipFile(stream) as archive:
                found = archive.comment.decode("ascii", "replace")
        else:
            with tarfile.open(fileobj=_expanded(stream, name, stack), mode="r|") as tar:
                tar.next()
                found = tar.pax_headers.get("comment", "")
    stream.seek(0)
    return found if re.fullmatch(r"[0-9a-f]{40}", found) else ""


class _Bounded(io.RawIOBase):
    """A stream that refuses to give out more than a number of bytes, whatever its headers promise."""

    def __init__(self, inner: IO[bytes], name: str, limit: int) -> None:
        self._inner = inner
        self._name = name
        self._left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._inner.read(len(view))
        self._left -= len(data)
        if self._left < 0:
            raise _too_large(self._name)
        view[: len(data)] = data
        return len(data)


def _expanded(stream: IO[bytes], name: str, stack: contextlib.ExitStack) -> IO[bytes]:
    lowered = name.lower()
    inner: IO[bytes] = stream
    if lowered.endswith((".gz", ".tgz")):
        inner = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=stream, mode="rb")))
    elif lowered.endswith((".xz", ".txz")):
        inner = cast("IO[bytes]", stack.enter_context(lzma.open(stream, "rb")))  # noqa: SIM115
    elif lowered.endswith((".bz2", ".tbz2")):
        inner = cast("IO[bytes]", stack.enter_context(bz2.open(stream, "rb")))  # noqa: SIM115
    # Headers and padding count as well, hence some room above the limit on contents.
    return cast(
        "IO[bytes]", io.BufferedReader(_Bounded(inner, name, MAX_TOTAL + MAX_MEMBERS * 2048), 1 << 20)
    )


def _tar(stream: IO[bytes], name: str, stack: contextlib.ExitStack) -> Generator[Member, None, None]:
    expanded = _expanded(stream, name, stack)
    with tarfile.open(fileobj=expanded, mode="r|") as tar:
        for info in tar:
            nothing: IO[bytes] = io.BytesIO()
            if info.isdir():
                yield Member(path=info.name, kind="folder", size=0, content=nothing)
            elif info.issym():
                yield Member(path=info.name, kind="symlink", size=0, content=nothing, target=info.linkname)
            elif info.islnk():
                yield Member(path=info.name, kind="hardlink", size=0, content=nothing, target=info.linkname)
            elif info.isfile():
                content = tar.extractfile(info)
                assert content is not None
                yield Member(path=info.name, kind=_file_kind(info.mode), size=info.size, content=content)
            else:
                yield Member(path=info.name, kind="special", size=0, content=nothing)
    # That an archive was cut or changed may show only at the very end, in the checksum.
    while expanded.read(1 << 20):
        pass


def _zip(stream: IO[bytes]) -> Generator[Member, None, None]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            form = stat.S_IFMT(mode)
            nothing: IO[bytes] = io.BytesIO()
            if info.is_dir():
                yield Member(path=info.filename, kind="folder", size=0, content=nothing)
            elif info.flag_bits & 0x1:
                raise zipfile.BadZipFile(f"{info.filename} is encrypted")
            elif form == stat.S_IFLNK and info.file_size <= MAX_NAME:
                target = archive.read(info).decode("utf-8", "surrogateescape")
                yield Member(path=info.filename, kind="symlink", size=0, content=nothing, target=target)
            elif form in (0, stat.S_IFREG):
                with archive.open(info) as content:
                    yield Member(
                        path=info.filename, kind=_file_kind(mode), size=info.file_size, content=content
                    )
            else:
                yield Member(path=info.filename, kind="special", size=0, content=nothing)


def _file_kind(mode: int) -> Literal["file", "executable"]:
    return "executable" if mode & 0o100 else "file"


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            with guard("read the archive", Path(name)):
                raise
        raise CorruptArchiveError(
            f"{name} is cut short or damaged, or not what its name says: {error or type(error).__name__}",
            hint="get the file again and compare its sha256 with the publisher's",
        ) from error


def _checked(source: Iterator[Member], name: str) -> Iterator[Member]:
    files: dict[str, str] = {}  # path -> kind
    folders: set[str] = set()
    total = 0
    for count, member in enumerate(source, start=1):
        path = _clean(member.path, name)
        total += member.size
        if count > MAX_MEMBERS or total > MAX_TOTAL:
            raise _too_large(name)
        if member.kind == "folder":
            continue
        if member.kind == "special":
            raise _unsafe(name, path, "is a device, pipe or other special file")
        parents = _parents(path)
        clash = next((p for p in parents if p in files), None)
        if clash is not None:
            what = "a link" if files[clash] == "symlink" else "a file"
            raise _unsafe(name, path, f"lies under {clash}, which is {what}")
        if path in files or path in folders:
            raise _unsafe(name, path, "occurs twice")
        target = member.target
        if member.kind == "symlink":
            check_link(path, target, name)
        elif member.kind == "hardlink":
            target = _clean(target, name)
            if files.get(target) not in ("file", "executable", "hardlink"):
                raise _unsafe(
                    name, path, f"is a hard link to {target!r}, which is no file before it in the archive"
                )
        files[path] = member.kind
        folders.update(parents)
        yield Member(path=path, kind=member.kind, size=member.size, content=member.content, target=target)


def check_link(path: str, target: str, where: str) -> None:
    """Raise UnsafeArchiveError unless a symbolic link at `path` stays inside whatever other links there are.

    Climbing is allowed only at the start of the target: after a name, which may itself be a link, ``..``
    could lead anywhere.
    """
    parts = target.split("/")
    climbs = 0
    while climbs < len(parts) and parts[climbs] in ("..", "."):
        climbs += 1
    up = parts[:climbs].count("..")
    if (
        not target
        or target.startswith("/")
        or "\0" in target
        or ".." in parts[climbs:]
        or up > len(_parents(path))
    ):
        raise _unsafe(where, path, f"links outside, to {target!r}")


def _clean(path: str, archive: str) -> str:
    if not path or "\0" in path or re.search(r"[\x00-\x1f\x7f\\]", path) is not None:
        raise _unsafe(archive, path, "has control characters or backslashes in its name")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path) is not None:
        raise _unsafe(archive, path, "has an absolute path")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _unsafe(archive, path, "climbs out of the archive's folder")
    if len(path.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise _unsafe(archive, f"{path[:60]}...", "has an overlong name")
    return "/".join(parts) or "."


def _parents(path: str) -> list[str]:
    found = []
    while path := posixpath.dirname(path):
        found.append(path)
    return found


def _unsafe(archive: str, member: str, why: str) -> UnsafeArchiveError:
    return UnsafeArchiveError(
        f"{archive} is refused: {member!r} {why}; nothing of it was written",
        hint="use an archive from upstream itself",
        data={"member": member},
    )


def _too_large(archive: str) -> UnsafeArchiveError:
    return UnsafeArchiveError(
        f"{archive} is refused: it expands to more than {MAX_TOTAL >> 30} GiB or {MAX_MEMBERS} files",
        hint="no source tree is that large; use an archive from upstream itself",
    )
