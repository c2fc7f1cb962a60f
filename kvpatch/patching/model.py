"""Patches as values: hunks, files, hooks, headers.

File content is bytes throughout, cut into lines that keep their terminator, so that CRLF and a missing final
newline are part of what is compared and nothing is decoded that need not be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpatch.patching.ranges import Range

Op = Literal[" ", "+", "-"]


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their terminators; only LF ends a line (a lone CR is content, as for git)."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    if parts[-1]:
        lines.append(parts[-1])
    return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Replace `removed` lines, `offset` lines into a hunk's pre-image, by `added`."""

    offset: int
    removed: int
    added: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hunk:
    """One hunk. `number` counts from 1 through the whole patch; line numbers are 1-based, as in the diff."""

    number: int
    old_start: int
    new_start: int
    heading: bytes
    body: tuple[tuple[Op, bytes], ...]

    @property
    def pre_image(self) -> tuple[bytes, ...]:
        """Context and removed lines: what the file must hold before."""
        return tuple(line for op, line in self.body if op != "+")

    @property
    def post_image(self) -> tuple[bytes, ...]:
        """Context and added lines: what the file holds afterwards."""
        return tuple(line for op, line in self.body if op != "-")

    @property
    def added(self) -> tuple[bytes, ...]:
        return tuple(line for op, line in self.body if op == "+")

    @property
    def leading(self) -> int:
        """Number of context lines before the first change."""
        count = 0
        for op, _ in self.body:
            if op != " ":
                break
            count += 1
        return count

    @property
    def trailing(self) -> int:
        """Number of context lines after the last change."""
        count = 0
        for op, _ in reversed(self.body):
            if op != " ":
                break
            count += 1
        return count

    @property
    def core_offset(self) -> int:
        """Where the core begins in the pre-image: one context line before the first change."""
        return max(0, self.leading - 1)

    @property
    def core(self) -> tuple[bytes, ...]:
        """The pre-image cut to one context line each side of the changes."""
        pre = self.pre_image
        return pre[self.core_offset : len(pre) - max(0, self.trailing - 1)]

    def edits(self) -> tuple[Edit, ...]:
        """The changes alone, as edits relative to the first line of the pre-image, in order."""
        edits: list[Edit] = []
        offset = removed = start = 0
        added: list[bytes] = []
        for op, line in (*self.body, (" ", b"")):
            if op == " ":
                if removed or added:
                    edits.append(Edit(offset=start, removed=removed, added=tuple(added)))
                offset += 1
                removed, added, start = 0, [], offset
            elif op == "-":
                removed += 1
                offset += 1
            else:
                added.append(line)
        return tuple(edits)


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePatch:
    """All hunks of one file; blobs are the full object names of the index line."""

    path: str
    old_blob: str
    new_blob: str
    mode: str
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hook:
    """A line that must be in `path` exactly once after applying (compared without surrounding white
    space).
    """

    path: str
    line: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """A validated patch file. `timestamp` is seconds since the epoch, `zone` like ``+0000``."""

    name: str
    stem: str
    file: Path
    sha256: str
    subject: str
    message: str
    author: str
    email: str
    timestamp: int
    zone: str
    range: Range
    base: str
    why: str
    upstream_status: str
    hooks: tuple[Hook, ...]
    files: tuple[FilePatch, ...]
