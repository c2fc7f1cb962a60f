"""What can be wrong with a source, one class a cause.

All end the process with status 4.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from kvpatch.errors import SourceError


class SpecError(SourceError):
    """What was given as a source is nothing that can be read (no such path, not a repository, not an
    archive).
    """

    code = "source-spec"


class NetworkError(SourceError):
    """A host cannot be reached, refused, or closed the connection half-way."""

    code = "source-network"


class UnknownRefError(SourceError):
    """The source has no such tag, branch, commit or version.

    `data["nearest"]` and `data["count"]` say what it has.
    """

    code = "source-unknown-ref"


class PinMismatchError(SourceError):
    """The source is not what the pin says. `data` has `expected` and `actual`."""

    code = "source-pin-mismatch"


class MissingObjectsError(SourceError):
    """A repository lacks objects that are needed. `data["missing"]` lists paths or object names."""

    code = "source-missing-objects"


class UnsafeArchiveError(SourceError):
    """An archive (or folder) holds something that could write or point outside, or would expand without
    bound.
    """

    code = "source-unsafe-archive"


class CorruptArchiveError(SourceError):
    """An archive is cut short, damaged, or holds nothing of use."""

    code = "source-corrupt-archive"


class DiskFullError(SourceError):
    """No space left, a quota, or a limit on file size."""

    code = "source-disk-full"


class AccessError(SourceError):
    """A file or folder cannot be read or written."""

    code = "source-access"


class WorkspaceError(SourceError):
    """The destination is not kvpatch's to overwrite, or could not be brought to the wanted state."""

    code = "source-workspace"


class GitError(SourceError):
    """A git command failed for a reason that none of the other classes covers."""

    code = "source-git"

    def __init__(self, message: str, *, status: int = 0, stderr: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint, data={"status": status, "stderr": stderr})
        self.status = status
        self.stderr = stderr


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST})


def disk_full(action: str, where: Path | str, detail: str) -> DiskFullError:
    """The error for a write that found no room; `where` is the file or folder written to."""
    return DiskFullError(
        f"cannot {action}: no room to write in {where} ({detail})",
        hint="free some space or name another folder (--cache-dir, --out), then run the same command again; "
        "nothing half-written is kept",
    )


def access_denied(action: str, where: Path | str, detail: str) -> AccessError:
    """The error for a file or folder that may not be read or written."""
    return AccessError(
        f"cannot {action}: {where} is not accessible ({detail})",
        hint=f"check the owner and mode of {where}, or name another folder (--cache-dir, --out)",
    )


@contextlib.contextmanager
def guard(action: str, where: Path) -> Iterator[None]:
    """Turn the OSErrors of a block into a SourceError that says what was tried, and where."""
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else where
        detail = error.strerror or str(error)
        if error.errno in _FULL:
            raise disk_full(action, at, detail) from error
        if error.errno in _DENIED:
            raise access_denied(action, at, detail) from error
        raise SourceError(f"cannot {action}: {at}: {detail}") from error
