"""Every failure a user can meet, each with its own process exit code.

The library raises these; only the command line turns them into text and an exit status. A message says what was
tried and why it failed; `hint` is the next thing to type or do.
"""

from __future__ import annotations

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
