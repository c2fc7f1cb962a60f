"""Commits made of sources without history: archives, source distributions, plain folders.

The files go straight into a bare repository of the cache, under a commit whose author, date and message
depend on nothing but the source, so that the same source is the same commit on every machine.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kvpatch.errors import GitError, guard
from kvpatch.gitrun import Git
from kvpatch.sources.archive import Member, check_link, members
from kvpatch.sources.errors import CorruptArchiveError, SpecError, UnsafeArchiveError
from kvpatch.sources.layout import Layout, short_id
from kvpatch.sources.model import Progress, Upstream, silent

_AUTHOR = "kvpatch <kvpatch@localhost>"
_CHUNK = 1 << 20
_MODES = {"file": "100644", "executable": "100755", "symlink": "120000"}

Select = Callable[[str], "str | None"]


class Imports:
    """The repository of one upstream's imported sources."""

    def __init__(self, layout: Layout, upstream: Upstream) -> None:
        self._layout = layout
        self._upstream = upstream

    @property
    def git_dir(self) -> Path:
        """The bare repository."""
        return self._layout.repository("imports", self._upstream.name)

    @property
    def objects(self) -> Path:
        """Its object folder."""
        return self.git_dir / "objects"

    def known(self, key: str) -> str | None:
        """The commit of a source imported before."""
        status, out, _ = Git(self.git_dir).attempt(
            "rev-parse", "--quiet", "--verify", f"{_ref(key)}^{{commit}}"
        )
        return out.decode().strip() if status == 0 else None

    def tree(self, commit: str) -> str:
        """Name of an imported commit's root tree."""
        return Git(self.git_dir).text("rev-parse", "--verify", f"{commit}^{{tree}}")

    def archive(
        self,
        path: Path,
        *,
        key: str,
        sha256: str,
        ref: str,
        date: str | None,
        select: Select | None,
        progress: Progress = silent,
    ) -> str:
        """Import an archive whose sha256 must be as given; returns the commit.

        `select` maps a member's path to its path in the tree, or None to leave it out; without it everything
        is taken and a single folder around everything is removed. Raises UnsafeArchiveError or
        CorruptArchiveError.
        """
        found = self.known(key)
        if found is not None:
            return found
        git_dir = self.git_dir
        with self._layout.lock(f"imports-{self._upstream.name}", progress):
            found = self.known(key)
            if found is not None:
                return found
            self._layout.sweep(git_dir)
            progress(f"importing {path.name}")
            head = _head(_ref(key), _message(self._upstream.name, ref, key), _seconds(date))
            # Fast rather than small: looking for deltas triples the time and saves nothing here.
            runner = Git(git_dir, config={"core.compression": "1"})
            try:
                with guard("read the archive", path), path.open("rb") as stream:
                    _same_file(stream, path, sha256)
                    with members(stream, path.name) as entries:
                        runner.feed(
                            "fast-import",
                            "--quiet",
                            "--depth=0",
                            "--date-format=raw",
                            write=lambda sink: _stream(sink, entries, select, head, path.name),
                        )
            except BaseException:
                self._layout.sweep(git_dir)
                raise
        found = self.known(key)
        assert found is not None
        return found

    def folder(
        self, path: Path, *, ref: str, date: str | None, progress: Progress = silent
    ) -> tuple[str, str]:
        """Import a folder as it is (ignored files too, .git and .kvpatch not); returns the tree's name and
        the commit.

        The second time only files whose size or times changed are read. Raises SpecError, UnsafeArchiveError.
        """
        git_dir = self.git_dir
        index = git_dir.parent / f"{short_id(str(path))}.index"
        with self._layout.lock(f"imports-{self._upstream.name}", progress):
            self._layout.sweep(git_dir)
            with guard("clean up after an interrupted run", index):
                index.with_name(f"{index.name}.lock").unlink(missing_ok=True)
            names = sorted(_walk(path))
            if not names:
                raise SpecError(f"{path} holds no files", hint=f"name {self._upstream.name}'s source folder")
            runner = Git(
                git_dir,
                work_tree=path,
                env={"GIT_INDEX_FILE": str(index)},
                config={"core.fileMode": "true", "core.symlinks": "true", "core.bare": "false"},
            )
            _no_conversion(git_dir)
            before = runner.run("ls-files", "-z").split(b"\0")
            listing = b"\0".join(dict.fromkeys([*filter(None, before), *names])) + b"\0"
            try:
                runner.run("update-index", "--add", "--remove", "--replace", "-z", "--stdin", stdin=listing)
            except GitError as error:
                raise SpecError(f"{path} cannot be imported: {error.stderr.strip()}") from error
            tree = runner.text("write-tree")
            key = f"tree:{tree}"
            commit = self.known(key)
            if commit is None:
                stamp = f"@{_seconds(date)} +0000"
                author, email = _AUTHOR.rstrip(">").split(" <")
                commit = Git(git_dir).text(
                    "commit-tree",
                    tree,
                    stdin=_message(self._upstream.name, ref, key).encode(),
                    env={
                        "GIT_AUTHOR_NAME": author,
                        "GIT_AUTHOR_EMAIL": email,
                        "GIT_AUTHOR_DATE": stamp,
                        "GIT_COMMITTER_NAME": author,
                        "GIT_COMMITTER_EMAIL": email,
                        "GIT_COMMITTER_DATE": stamp,
                    },
                )
                Git(git_dir).run("update-ref", _ref(key), commit)
        return tree, commit


def below(folder: str) -> Select:
    """Selects what lies in ``<any one folder>/<folder>/`` of an archive."""
    inner = f"/{folder}/"

    def select(path: str) -> str | None:
        top, separator, rest = path.partition("/")
        rest = separator + rest
        return rest.removeprefix(inner) if top and rest.startswith(inner) else None

    return select


def _stream(
    sink: IO[bytes], entries: Iterator[Member], select: Select | None, head: bytes, name: str
) -> None:
    marks: dict[str, tuple[str, int]] = {}  # path in the archive -> mode, mark
    chosen: dict[str, tuple[str, int]] = {}  # path before a single top folder is removed
    links: dict[str, str] = {}  # the same path -> target
    count = 0
    for member in entries:
        place = member.path if select is None else select(member.path)
        if place is None:
            continue
        if any(part.lower() == ".git" for part in place.split("/")):
            continue  # a packer's own repository or submodule link: no part of the source
        if member.kind == "hardlink":
            if member.target not in marks:
                raise UnsafeArchiveError(
                    f"{name} is refused: {member.path!r} is a hard link to something left out",
                    data={"member": member.path},
                )
            chosen[place] = marks[member.path] = marks[member.target]
            continue
        count += 1
        if member.kind == "symlink":
            links[place] = member.target
            target = member.target.encode("utf-8", "surrogateescape")
            sink.write(b"blob\nmark :%d\ndata %d\n%s\n" % (count, len(target), target))
        else:
            _blob(sink, member, count, name)
        chosen[place] = marks[member.path] = (_MODES[member.kind], count)
    if not chosen:
        raise CorruptArchiveError(
            f"{name} holds no files of the wanted source", hint="check that it is the archive you meant"
        )
    drop = _single_top(chosen) if select is None else 0
    for place, link in links.items():
        check_link(place[drop:], link, name)
    sink.write(head)
    for place, (mode, mark) in sorted(chosen.items()):
        path = place[drop:].encode("utf-8", "surrogateescape")
        if path.startswith(b'"'):
            path = b'"' + path.replace(b'"', b'\\"') + b'"'
        sink.write(b"M %s :%d %s\n" % (mode.encode(), mark, path))
    sink.write(b"\n")


def _blob(sink: IO[bytes], member: Member, mark: int, name: str) -> None:
    sink.write(b"blob\nmark :%d\ndata %d\n" % (mark, member.size))
    left = member.size
    while left:
        chunk = member.content.read(min(left, _CHUNK))
        if not chunk:
            raise CorruptArchiveError(
                f"{name} is cut short: {member.path!r} has {member.size - left} of {member.size} bytes",
                hint="get the file again and compare its sha256 with the publisher's",
            )
        left -= len(chunk)
        sink.write(chunk)
    sink.write(b"\n")


def _head(ref: str, message: str, seconds: int) -> bytes:
    text, author = message.encode(), f"{_AUTHOR} {seconds} +0000"
    lines = f"commit {ref}\nauthor {author}\ncommitter {author}\ndata {len(text)}\n"
    return lines.encode() + text + b"\n"


def _single_top(paths: dict[str, tuple[str, int]]) -> int:
    tops = {path.split("/", 1)[0] for path in paths}
    top = tops.pop()
    return len(top) + 1 if not tops and all(path.startswith(f"{top}/") for path in paths) else 0


def _walk(root: Path) -> Iterator[bytes]:
    def refuse(error: OSError) -> None:
        raise error

    with guard("read the source folder", root):
        for folder, subfolders, files in os.walk(root, onerror=refuse):
            at = Path(folder).relative_to(root)
            links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
            subfolders[:] = sorted(
                n
                for n in subfolders
                if n not in links and n.lower() != ".git" and not (folder == str(root) and n == ".kvpatch")
            )
            for name in [*files, *links]:
                if name.lower() == ".git":
                    continue
                path, place = Path(folder) / name, (at / name).as_posix()
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    check_link(place, str(path.readlink()), str(root))
                elif not stat.S_ISREG(mode):
                    raise UnsafeArchiveError(
                        f"{root} is refused: {place!r} is a device, pipe or socket",
                        hint="name a folder that holds source files only",
                    )
                yield os.fsencode(place)


def _no_conversion(git_dir: Path) -> None:
    with guard("write in the cache folder", git_dir):
        (git_dir / "info").mkdir(exist_ok=True)
        (git_dir / "info" / "attributes").write_text(NO_CONVERSION, encoding="utf-8")


# In $GIT_DIR/info/attributes, above any .gitattributes of the tree: bytes go in and out as they are.
NO_CONVERSION = "* -text !eol !filter !ident !working-tree-encoding\n"


def _same_file(stream: IO[bytes], path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    stream.seek(0)
    if digest.hexdigest() != sha256:
        raise CorruptArchiveError(
            f"{path} changed while it was being used",
            hint="run the same command again when nothing writes to it",
        )


def _ref(key: str) -> str:
    return f"refs/kvpatch/{short_id(key)}"


def _message(name: str, ref: str, key: str) -> str:
    return f"{name} {ref}\n\nKvpatch-Source: {key}\n"


def _seconds(date: str | None) -> int:
    if date is None:
        return 0
    day = datetime.date.fromisoformat(date[:10])
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.timezone.utc).timestamp())
