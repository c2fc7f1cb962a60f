"""What can go wrong with running pools. Exit 10, as for the library: it is there that they are asked."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path

from kvpatch.errors import KvpatchError, LibraryError
from kvpatch.runtime import CallError

_DELETE = re.compile(r"is damaged|is not a ledger|under creation|is a ledger of version|has mode|hard links")


class PoolsError(LibraryError):
    """There is nothing to ask, or it did not do what it was asked."""

    code = "pools"


class NoPoolsError(PoolsError):
    """No process holds memory through the library, as far as this user can see."""

    code = "pools-none"


class DeniedError(PoolsError):
    """The pools belong to another user."""

    code = "pools-denied"


class DamagedError(PoolsError):
    """A ledger file is stale, torn, or of another version of the library."""

    code = "pools-file"


class TargetError(PoolsError):
    """No process, or more than one, is what the user named."""

    code = "pools-target"


class RefusedError(PoolsError):
    """A process did not carry out a command, or a limit was not taken."""

    code = "pools-refused"


def user_name(uid: int) -> str:
    """The name of a user, its number where it has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def as_user(uid: int, command: str) -> str:
    """How the command is run as another user."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"'#{uid}'"
    return f"sudo -u {name} kvpatch {command}"


def of_file(path: Path, error: CallError, command: str) -> KvpatchError:
    """What the library said of a ledger file, with the way out."""
    if error.name == "KVCACHED_E_LEDGER":
        if "belongs to uid" in error.detail:
            return denied(path, _owner(path), command)
        if _DELETE.search(error.detail):
            return DamagedError(
                error.message,
                hint=f"`fuser -v {path}` says who uses it: end them (or use the kvpatch that made their build), "
                f"then `rm {path}`; the next process makes it anew",
                data={**error.data, "file": str(path)},
            )
        return DamagedError(
            error.message, hint=f"look at it with `ls -l {path}`", data={**error.data, "file": str(path)}
        )
    return error


def denied(path: Path, uid: int, command: str) -> DeniedError:
    """The error for the file of another user."""
    return DeniedError(
        f"{path} belongs to {user_name(uid)}, and only that user may look at it (not root either)",
        hint=f"{as_user(uid, command)}; or, to look only: kvpatch top --by ollama",
        data={"file": str(path), "owner": user_name(uid), "uid": uid},
    )


def _owner(path: Path) -> int:
    try:
        return path.lstat().st_uid
    except OSError:
        return os.geteuid()
