"""Finding hunks in files: whole-line blocks counted, the function around a place, the nearest lookalike.

Nothing here guesses: a block is found where its lines stand one after the other, byte for byte, and every
occurrence is reported. What is approximate (`nearest`) only ever feeds a report.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvpatch.patching.model import Hunk, split_lines

# git's default rule for the text after a hunk's second @@: the last line before the hunk that begins with a
# letter, `_` or `$`, cut to 80 bytes (xdiff, def_ff).
_FUNCTION = re.compile(rb"[A-Za-z_$]")
_HEADING_BYTES = 80
_LABEL = re.compile(rb"[A-Za-z_][A-Za-z0-9_ ]*:\s*(//.*)?$")
_MAX_NEAREST_LINES = 50_000
_MIN_RATIO = 0.6


class Text:
    """One file's lines, with the look-ups that placing a hunk needs. Indices are 0-based."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.lines = split_lines(data)

    def find(self, block: Sequence[bytes], start: int = 0, stop: int | None = None) -> list[int]:
        """Every index at which `block` stands as whole lines inside [start, stop); overlapping ones count."""
        block = list(block)
        if not block:
            return []
        last = (len(self.lines) if stop is None else stop) - len(block)
        lines, first = self.lines, block[0]
        return [i for i in range(start, last + 1) if lines[i] == first and lines[i : i + len(block)] == block]

    def find_ignoring_endings(self, block: Sequence[bytes]) -> list[int]:
        """As `find`, but CRLF, LF and a missing final newline are taken for the same."""
        bare = Text(b"")
        bare.lines = [line.rstrip(b"\r\n") for line in self.lines]
        return bare.find([line.rstrip(b"\r\n") for line in block])

    def find_line(self, stripped: str) -> list[int]:
        """Every index of a line that equals `stripped` but for white space around it."""
        wanted = stripped.encode()
        return [i for i, line in enumerate(self.lines) if wanted in line and line.strip() == wanted]

    def owner(self, index: int) -> int | None:
        """The line that opens the function (or type) in whose body line `index` lies; None at file scope.

        A line that begins in column one with a closing bracket ends a body, unless it opens the next (``)
        {``).
        """
        for i in range(min(index, len(self.lines)) - 1, -1, -1):
            if closes_scope(self.lines[i]):
                return None
            if opens_scope(self.lines[i]):
                return i
        return None

    def body_end(self, owner: int) -> int:
        """One past the last line of the body that the line `owner` opens."""
        for i in range(owner + 1, len(self.lines)):
            if closes_scope(self.lines[i]) or opens_scope(self.lines[i]):
                return i
        return len(self.lines)


def opens_scope(line: bytes) -> bool:
    """Whether a line reads as the beginning of a function or type, as opposed to a label or a one-line
    declaration.
    """
    bare = line.rstrip()
    return bool(_FUNCTION.match(bare)) and not bare.endswith(b";") and not _LABEL.match(bare)


def closes_scope(line: bytes) -> bool:
    """Whether a line ends the body of a function or type."""
    return line[:1] in (b"}", b")") and not line.rstrip().endswith(b"{")


def heading_of(line: bytes) -> bytes:
    """How git shows the line after a hunk's second @@."""
    return line.rstrip(b"\r\n")[:_HEADING_BYTES].rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stray:
    """A block stands once, but not in the function it was recorded in (0-based indices).

    `recorded` is where that function begins now, None when no line has its name any more: renamed, or gone.
    """

    owner: int
    recorded: int | None


def stray(text: Text, hunk: Hunk, at: int) -> Stray | None:
    """Whether the block at index `at` lies in another function than the hunk's heading names.

    At file scope, and where the block itself holds the function's first line, there is no function to be
    wrong about.
    """
    heading = hunk.heading.rstrip()
    if not opens_scope(heading) or any(opens_scope(line) for line in hunk.pre_image[: hunk.leading]):
        return None
    recorded = [i for i, line in enumerate(text.lines) if heading_of(line) == heading]
    owner = text.owner(at)
    if owner is None or owner in recorded:
        return None
    return Stray(owner=owner, recorded=recorded[0] if recorded else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """The place most like a lost block: `matched` of `total` lines stand there as recorded, `missing` do not.

    `index` is the 0-based index of the anchor, a line that is really in the file.
    """

    index: int
    matched: int
    total: int
    missing: tuple[bytes, ...]


def nearest(text: Text, block: Sequence[bytes]) -> Nearest | None:
    """Where most of the block's lines stand in order and unshifted, rare and long lines counting most.

    When no line of the block is left, the line most similar to its longest one; None when nothing comes
    close.
    """
    if len(text.lines) > _MAX_NEAREST_LINES:
        return None
    bare = [line.strip() for line in text.lines]
    wanted = [line.strip() for line in block]
    counts = Counter(bare)
    places: dict[bytes, list[int]] = {line: [] for line in wanted if len(line) > 1}
    for i, line in enumerate(bare):
        if line in places:
            places[line].append(i)
    votes: Counter[int] = Counter()
    for offset, line in enumerate(wanted):
        for i in places.get(line, ()):
            votes[i - offset] += 1 + len(line) * 1000 // counts[line]
    if votes:
        best = max(votes, key=lambda start: (votes[start], -start))
        hits = [o for o, line in enumerate(wanted) if 0 <= best + o < len(bare) and bare[best + o] == line]
        anchor = max(
            (o for o in hits if len(wanted[o]) > 1), key=lambda o: (len(wanted[o]) / counts[wanted[o]], -o)
        )
        missing = tuple(block[o].rstrip(b"\r\n") for o in range(len(block)) if o not in hits)
        return Nearest(index=best + anchor, matched=len(hits), total=len(block), missing=missing)
    longest = max(wanted, key=len, default=b"").decode("latin-1")
    if len(longest) < 4:
        return None
    similar = difflib.get_close_matches(
        longest, {line.decode("latin-1") for line in bare if len(line) > 1}, n=1, cutoff=_MIN_RATIO
    )
    if not similar:
        return None
    return Nearest(
        index=bare.index(similar[0].encode("latin-1")),
        matched=0,
        total=len(block),
        missing=tuple(line.rstrip(b"\r\n") for line in block),
    )
