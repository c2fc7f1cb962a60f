"""What the kernel says about a process's memory: an independent witness of the figures that servers log.

`/proc/<pid>/smaps` lists the process's mappings (proc(5)). A mapping may reach over the ends of the range
asked about (the kernel merges neighbours of one kind), and its resident bytes are known only in sum: so a
range has a lower and an upper bound, which coincide unless a mapping straddles an end.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ([rwxps-]{4}) [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ \d+\s*(.*)$")
_FIELD = re.compile(r"^(Rss|Swap):\s+(\d+) kB$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapping:
    """One mapping: [start, end), permissions as in "rw-p", resident and swapped bytes."""

    start: int
    end: int
    perms: str
    name: str
    rss: int
    swap: int

    @property
    def usable(self) -> bool:
        """Whether the process may read and write there."""
        return self.perms.startswith("rw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes of a set of ranges: `size` asked about, `usable` readable and writable, and the bounds of what is
    physically held (resident or swapped out)."""

    size: int
    usable: int
    held_min: int
    held_max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """An address range [start, start + size)."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def parse(text: str) -> tuple[Mapping, ...]:
    """Mappings of an smaps text, in its order. Lines of other fields are skipped. Raises ValueError for a
    text that does not begin with a mapping."""
    found: list[Mapping] = []
    head: re.Match[str] | None = None
    fields: dict[str, int] = {}

    def flush() -> None:
        if head is not None:
            found.append(
                Mapping(
                    start=int(head[1], 16),
                    end=int(head[2], 16),
                    perms=head[3],
                    name=head[4],
                    rss=fields.get("Rss", 0),
                    swap=fields.get("Swap", 0),
                )
            )

    for line in text.splitlines():
        if (match := _HEAD.match(line)) is not None:
            flush()
            head, fields = match, {}
        elif head is None:
            raise ValueError(f"not an smaps text, first line: {line!r}")
        elif (match := _FIELD.match(line)) is not None:
            fields[match[1]] = int(match[2]) * 1024
    flush()
    return tuple(found)


def read(pid: int) -> tuple[Mapping, ...]:
    """Mappings of a running process. Raises OSError when it has ended or belongs to somebody else."""
    return parse(Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace"))


def longest_present_run(pid: int, mapping: Mapping) -> int:
    """Bytes of the longest run of pages of a mapping that are in memory or swapped out, by /proc/<pid>/pagemap: 8
    bytes a page, of which bit 63 says present and bit 62 swapped (the kernel's admin-guide/mm/pagemap). Raises
    OSError as `read` does."""
    page = os.sysconf("SC_PAGESIZE")
    entries = array("Q")
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
        file.seek(mapping.start // page * entries.itemsize)
        wanted = (mapping.end - mapping.start) // page * entries.itemsize
        data = b""
        while len(data) < wanted and (piece := file.read(wanted - len(data))):
            data += piece
    entries.frombytes(data[: len(data) // entries.itemsize * entries.itemsize])
    longest = run = 0
    for entry in entries:
        run = run + 1 if entry >> 62 else 0
        longest = max(longest, run)
    return longest * page


def usage(mappings: Iterable[Mapping], ranges: Iterable[Range]) -> Usage:
    """What `ranges` (which must not overlap) hold, by `mappings`."""
    wanted = tuple(ranges)
    usable = held_min = held_max = 0
    for mapping in mappings:
        inside = sum(max(0, min(mapping.end, r.end) - max(mapping.start, r.start)) for r in wanted)
        if not inside:
            continue
        outside = mapping.end - mapping.start - inside
        held = mapping.rss + mapping.swap
        if mapping.usable:
            usable += inside
        held_min += max(0, held - outside)
        held_max += min(held, inside)
    return Usage(size=sum(r.size for r in wanted), usable=usable, held_min=held_min, held_max=held_max)
