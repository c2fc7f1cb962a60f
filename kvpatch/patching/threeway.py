"""The third way to place a hunk: git's 3-way merge against what the patch was made on, checked afterwards.

A merge alone is not trusted: with lookalike code, git's alignment can carry a hunk into the wrong function
without a conflict. So the merge only proposes. It is accepted when, for every hunk, the lines around the
change stand exactly once in the same function as in the base (in the whole file, when no function or a
repeated name encloses it), and when putting the changes there gives exactly what git's merge gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvpatch.errors import PatchError
from kvpatch.patching.gitplumbing import Repository
from kvpatch.patching.match import Text, heading_of
from kvpatch.patching.model import FilePatch, Hunk, Patch


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A hunk and the 0-based index at which its pre-image (for 3-way: where it would) begin."""

    hunk: Hunk
    at: int


def edit(text: Text, placements: Sequence[Placement]) -> bytes | None:
    """The file with the changes of all hunks made; None when two of them touch the same lines."""
    edits = sorted(
        (place.at + change.offset, change.removed, change.added)
        for place in placements
        for change in place.hunk.edits()
    )
    out: list[bytes] = []
    done = 0
    for position, (start, removed, added) in enumerate(edits):
        if start < done or (position and start == edits[position - 1][0]):
            return None
        out += text.lines[done:start]
        out += added
        done = start + removed
    return b"".join(out + text.lines[done:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """Outcome for the hunks of a file: where each lost one belongs (by number), or why it cannot be said."""

    at: Mapping[int, int]
    reasons: Mapping[int, str]


class Bases:
    """Finds the content a patch was made on: the blob of its index line, or the file at its base commit.

    The base commit is asked for through `fetch_base`, once, and only when it is not there already.
    """

    def __init__(
        self, repo: Repository, fetch_base: Callable[[str], bool] | None, patches: Sequence[Patch]
    ) -> None:
        self._repo = repo
        self._fetch = fetch_base
        self._patches = patches
        self._commits: dict[str, str | None] = {}
        self._asked: set[str] = set()

    def commit(self, patch: Patch, *, fetch: bool = True) -> str | None:
        """The patch's base commit, brought in when needed; None when it is not to be had."""
        found = self._commits.get(patch.base)
        if found is None:
            found = self._repo.commit_of(patch.base)
            if found is None and fetch and self._bring(patch.base):
                found = self._repo.commit_of(patch.base)
            self._commits[patch.base] = found
        return found

    def contents(self, patch: Patch, file: FilePatch) -> Iterator[bytes]:
        """Candidates, best first: the recorded blob, then the base commit's file with earlier patches
        applied.
        """
        recorded = self._blob(file.old_blob)
        if recorded is None and self._bring(patch.base):
            recorded = self._blob(file.old_blob)
        if recorded is not None:
            yield recorded
        commit = self.commit(patch)
        if commit is None:
            return
        entry = self._repo.entries(commit).get(file.path)
        start = self._blob(entry.oid) if entry is not None else None
        if start is None:
            return
        data = start
        for earlier in self._patches:
            if earlier.name == patch.name:
                break
            for other in earlier.files:
                if other.path == file.path:
                    data = _apply_exactly(data, other) or data
        yield data
        if data != start:
            yield start

    def _blob(self, oid: str) -> bytes | None:
        if not self._repo.has(oid):
            return None
        try:
            return self._repo.blob(oid)
        except PatchError:
            return None

    def _bring(self, base: str) -> bool:
        if self._fetch is None or base in self._asked:
            return False
        self._asked.add(base)
        return self._fetch(base)


def _apply_exactly(data: bytes, file: FilePatch) -> bytes | None:
    text = Text(data)
    places: list[Placement] = []
    for hunk in file.hunks:
        found = text.find(hunk.pre_image)
        if len(found) != 1:
            return None
        places.append(Placement(hunk=hunk, at=found[0]))
    return edit(text, places)


def merge(
    repo: Repository, text: Text, file: FilePatch, placed: Sequence[Placement], contents: Iterator[bytes]
) -> Merged:
    """Place the hunks of `file` that are not in `placed` by a 3-way merge; `contents` are candidates for
    the base.
    """
    known = {place.hunk.number: place.at for place in placed}
    lost = [hunk for hunk in file.hunks if hunk.number not in known]
    reason = "the content it was made on is not to be had, so no 3-way merge could be tried"
    for data in contents:
        base = Text(data)
        starts = {hunk.number: base.find(hunk.pre_image) for hunk in file.hunks}
        if any(len(found) != 1 for found in starts.values()):
            reason = "the block is not unique in what the patch was made on, so a 3-way merge proves nothing"
            continue
        original = [Placement(hunk=hunk, at=starts[hunk.number][0]) for hunk in file.hunks]
        theirs = edit(base, original)
        if theirs is None:
            continue
        merged = repo.merge_file(text.data, data, theirs)
        if merged is None:
            reason = "the lines beside the change have changed (3-way merge: conflict)"
            continue
        at: dict[int, int] = {}
        reasons: dict[int, str] = {}
        for hunk in lost:
            place, why = _confirm(text, base, hunk, starts[hunk.number][0])
            if place is None:
                reasons[hunk.number] = why
            else:
                at[hunk.number] = place
        if reasons:
            return Merged(at=at, reasons=reasons)
        ours = edit(text, [*placed, *(Placement(hunk=hunk, at=at[hunk.number]) for hunk in lost)])
        if ours != merged:
            why = "a 3-way merge puts the change elsewhere than the lines around it say"
            return Merged(at={}, reasons={hunk.number: why for hunk in lost})
        return Merged(at=at, reasons={})
    return Merged(at={}, reasons={hunk.number: reason for hunk in lost})


def _confirm(text: Text, base: Text, hunk: Hunk, base_at: int) -> tuple[int | None, str]:
    """Where the hunk's core stands in `text`, if once in the function that encloses it in `base`."""
    change = base_at + hunk.leading
    owner = base.owner(change)
    start, stop, scope = 0, len(text.lines), "the file"
    if owner is not None:
        heading = heading_of(base.lines[owner])
        here = [i for i, line in enumerate(text.lines) if heading_of(line) == heading]
        there = [i for i, line in enumerate(base.lines) if heading_of(line) == heading]
        if not here:
            return None, f"its function is gone: `{heading.decode('utf-8', 'replace')}`"
        if len(here) == 1 and len(there) == 1:
            start, stop = here[0], text.body_end(here[0]) + 1
            scope = f"its function at line {here[0] + 1}"
    found = text.find(hunk.core, start, min(stop, len(text.lines)))
    if not found:
        return None, f"the lines beside the change are not in {scope}"
    if len(found) > 1:
        numbers = ", ".join(str(i + 1) for i in found)
        return None, f"the lines beside the change stand more than once in {scope}: lines {numbers}"
    if owner is not None:
        now = text.owner(found[0] + hunk.leading - hunk.core_offset)
        if now is None or heading_of(text.lines[now]) != heading_of(base.lines[owner]):
            return (
                None,
                f"the lines beside the change, at line {found[0] + 1}, are in another function than before",
            )
    # The number may be negative when the outer context was cut off at the top; only the changes' places
    # count.
    return found[0] - hunk.core_offset, ""
