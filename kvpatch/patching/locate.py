"""Where a file went: by git's rename detection when the base commit is at hand, else by its hunks' own
lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from kvpatch.errors import PatchError
from kvpatch.patching.gitplumbing import Repository
from kvpatch.patching.match import Text
from kvpatch.patching.model import FilePatch

_MAX_CANDIDATES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """The new path, how it was found, and the 1-based line of each hunk (by number) that stands there
    once.
    """

    path: str
    how: str
    lines: Mapping[int, int]


def find_moved(
    file: FilePatch, repo: Repository, commit: str, paths: set[str], base: str | None
) -> Moved | None:
    """Look for the file that took over from `file.path`, which `commit` does not have. None when none is
    certain.
    """
    if base is not None:
        renamed = repo.renamed_to(file.path, base, commit)
        if renamed is not None and renamed in paths:
            return Moved(
                path=renamed, how="git sees a rename", lines=_places(file, _read(repo, commit, renamed))
            )
    # The longest line of any hunk narrows the search down; the hunks themselves decide.
    longest = max(
        (line for hunk in file.hunks for line in hunk.pre_image), key=lambda line: len(line.strip())
    )
    if len(longest.strip()) < 2:
        return None
    candidates = [path for path in repo.paths_with_line(commit, longest.strip(b"\r\n")) if path in paths]
    name = PurePosixPath(file.path).name
    candidates.sort(key=lambda path: (PurePosixPath(path).name != name, path))
    scored: list[tuple[int, str, dict[int, int]]] = []
    for path in candidates[:_MAX_CANDIDATES]:
        places = _places(file, _read(repo, commit, path))
        if places:
            scored.append((len(places), path, places))
    if not scored:
        return None
    best = max(score for score, _, _ in scored)
    winners = [(path, places) for score, path, places in scored if score == best]
    if len(winners) > 1:
        same_name = [(path, places) for path, places in winners if PurePosixPath(path).name == name]
        if len(same_name) != 1:
            return None
        winners = same_name
    path, places = winners[0]
    return Moved(path=path, how=f"{best} of {len(file.hunks)} hunks stand there once", lines=places)


def _read(repo: Repository, commit: str, path: str) -> bytes:
    try:
        return repo.run("cat-file", "blob", f"{commit}:{path}")[1]
    except PatchError:
        return b""  # content missing from this clone


def _places(file: FilePatch, data: bytes) -> dict[int, int]:
    text = Text(data)
    found = {hunk.number: text.find(hunk.pre_image) for hunk in file.hunks}
    return {number: at[0] + 1 for number, at in found.items() if len(at) == 1}
