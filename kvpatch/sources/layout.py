"""The cache folder: where things lie in it, who may change them when, and how they get there whole.

::

    CACHEDIR.TAG            tells backup programs to skip the folder
    git/<name>-<id>.git     one bare, shallow, blob-filtered repository a URL
    imports/<name>.git      commits made of archives, source distributions and folders
    imports/<id>.index      what a folder looked like when it was last imported
    sdists/<file>           downloaded source distributions, checked
    stamps/<id>.json        sha256 of a file whose size and times have not changed since
    view.git                an empty repository to read other object folders with
    locks/                  file locks; may be deleted when no kvpatch runs

Everything appears by a rename within the folder, so a name that exists is complete. Whoever changes a
repository holds its lock; readers need none, because objects are only ever added.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from kvpatch import paths
from kvpatch.errors import guard
from kvpatch.gitrun import init_repository
from kvpatch.sources.model import Progress, silent

_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder is a cache made by kvpatch. It can be deleted; see https://bford.info/cachedir/\n"
)
_LEFTOVERS = ("*.lock", "refs/**/*.lock", "fast_import_crash_*", "objects/**/tmp_*", "objects/pack/.tmp-*")
_CHUNK = 1 << 20
_STALE_SECONDS = 86400.0
# A file changed within the clock's granularity of the moment it was hashed could keep its times.
_SETTLED_NS = 2_000_000_000


class Layout:
    """Paths, locks and atomic moves of one cache folder, made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folder. Raises AccessError or DiskFullError."""
        with guard("make the cache folder", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            tag = self.root / "CACHEDIR.TAG"
            if not tag.is_file():
                paths.write_whole(tag, _TAG)

    def repository(self, folder: str, name: str) -> Path:
        """A bare repository `folder`/`name`.git, empty when new."""
        path = self.root / folder / f"{name}.git"
        if not (path / "HEAD").is_file():
            self.prepare()
            with self.lock(f"{folder}-{name}"), guard("make a repository in the cache", self.root):
                if not (path / "HEAD").is_file():
                    with self.incoming() as incoming:
                        init_repository(incoming / "repository", bare=True)
                        path.parent.mkdir(exist_ok=True)
                        (incoming / "repository").rename(path)
        return path

    def view(self) -> Path:
        """The empty repository that object folders are read through."""
        return self.repository(".", "view")

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Path]:
        """A new folder inside the cache for things not yet complete; removed at the end of the block."""
        with guard("write in the cache folder", self.root):
            parent = self.root / "incoming"
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            path = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, name: str, progress: Progress = silent) -> Iterator[None]:
        """Hold the lock `name` against threads and processes; the system drops it when the holder dies."""
        with guard("lock the cache folder", self.root):
            folder = self.root / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / f"{name}.lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                progress(f"waiting for another kvpatch that works on {name}")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def sweep(self, git_dir: Path) -> None:
        """Remove what a killed git left in a repository of the cache. Only for the holder of its lock."""
        with guard("clean up after an interrupted run", git_dir):
            for pattern in _LEFTOVERS:
                for path in git_dir.glob(pattern):
                    path.unlink(missing_ok=True)

    def sha256(self, path: Path) -> str:
        """sha256 of a file in hex; remembered while its size, times and inode stay the same."""
        stamp = self.root / "stamps" / f"{short_id(str(path.absolute()))}.json"
        with guard("read", path), path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            identity = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(stamp.read_text(encoding="utf-8"))
                if known["file"] == identity:
                    return str(known["sha256"])
            digest = hashlib.sha256()
            started = time.time_ns()
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        value = digest.hexdigest()
        if started - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            self.prepare()
            with guard("write in the cache folder", stamp):
                paths.write_whole(stamp, json.dumps({"file": identity, "sha256": value}))
        return value


def _sweep(incoming: Path) -> None:
    # Only killed runs leave anything here; a day is longer than any of them takes.
    horizon = time.time() - _STALE_SECONDS
    for path in incoming.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < horizon:
                shutil.rmtree(path, ignore_errors=True)


def short_id(text: str) -> str:
    """16 hex digits that stand for a text in a file name."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
