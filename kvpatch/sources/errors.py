"""What can be wrong with a source, one class a cause.

All end the process with status 4.
"""

from __future__ import annotations

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


class WorkspaceError(SourceError):
    """The destination is not kvpatch's to overwrite, or could not be brought to the wanted state."""

    code = "source-workspace"
