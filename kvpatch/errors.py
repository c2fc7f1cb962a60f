"""Every failure a user can meet, each with its own process exit code.

The library raises these; only the command line turns them into text and an exit status. A message says what was
tried and why it failed; `hint` is the next thing to type or do.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar


class KvpatchError(Exception):
    """Base of all expected failures. `data` is JSON-serialisable detail for `--json` (a patch report, say)."""

    exit_code: ClassVar[int] = 70
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str | None = None, data: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data = data or {}


class UsageError(KvpatchError):
    """An argument, setting or file named by the user is wrong (exit 2)."""

    exit_code = 2
    code = "usage"


class ToolchainError(KvpatchError):
    """A compiler or build tool is missing or too old (exit 3)."""

    exit_code = 3
    code = "toolchain"


class SourceError(KvpatchError):
    """Upstream source cannot be had, or is not what the pin says (exit 4)."""

    exit_code = 4
    code = "source"


class DiskFullError(SourceError):
    """No space left, a quota, or a limit on file size."""

    code = "source-disk-full"


class AccessError(SourceError):
    """A file or folder cannot be read or written."""

    code = "source-access"


class GitError(SourceError):
    """A git command failed for a reason that none of the other classes covers."""

    code = "source-git"

    def __init__(self, message: str, *, status: int = 0, stderr: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint, data={"status": status, "stderr": stderr})
        self.status = status
        self.stderr = stderr


class PatchError(KvpatchError):
    """A patch does not apply, or a hook is not where it must be afterwards (exit 5)."""

    exit_code = 5
    code = "patch"


class GenerateError(KvpatchError):
    """A template cannot be rendered or a generated file cannot be written (exit 6)."""

    exit_code = 6
    code = "generate"


class CompileError(KvpatchError):
    """Configuring, compiling or installing failed (exit 7)."""

    exit_code = 7
    code = "compile"


class SmokeError(KvpatchError):
    """The built binaries do not behave (exit 8)."""

    exit_code = 8
    code = "smoke"


class VerifyError(KvpatchError):
    """A build does not match its manifest or its lock (exit 9)."""

    exit_code = 9
    code = "verify"


class LibraryError(KvpatchError):
    """libkvcached cannot be loaded, or it refused what was asked of it (exit 10)."""

    exit_code = 10
    code = "library"


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
