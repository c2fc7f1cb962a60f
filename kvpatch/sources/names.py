"""Names of tags and commits: which are well-formed, which are near to a wrong one, and whether two commits
agree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from kvpatch.sources.errors import PinMismatchError, SpecError, UnknownRefError
from kvpatch.sources.model import Pin, Upstream

_HEX = re.compile(r"[0-9a-f]{7,40}")
_FULL = re.compile(r"[0-9a-f]{40}")
_PREFIX_DIGITS = 9
_SHOWN = 6


def is_commit(name: str) -> bool:
    """Whether a name could be a commit's, whole or shortened."""
    return _HEX.fullmatch(name.lower()) is not None


def is_full_commit(name: str) -> bool:
    """Whether a name is a whole commit name."""
    return _FULL.fullmatch(name) is not None


def check_ref(ref: str) -> str:
    """`ref` itself when it can name a tag, branch or commit.

    Raises SpecError when git would not take it as one.
    """
    bad = (
        not ref
        or ref.startswith(("-", "/", "."))
        or ref.endswith(("/", ".", ".lock"))
        or any(part in ref for part in ("..", "//", "@{", "/."))
        or re.search(r"[\x00-\x20\x7f~^:?*\[\\]", ref) is not None
    )
    if bad:
        raise SpecError(
            f"{ref!r} cannot be the name of a tag, branch or commit",
            hint="give a release such as v0.32.15, a build such as b10488, or a commit",
        )
    return ref


def check_commit(upstream: Upstream, pin: Pin, commit: str, location: str) -> bool:
    """Compare a commit with the pin's. True when it was compared, False when the pin names none.

    Raises PinMismatchError naming both, or SpecError when the pin's commit is shorter than 9 hex digits.
    """
    if pin.commit is None:
        return False
    wanted = pin.commit.lower()
    if not is_commit(wanted) or len(wanted) < _PREFIX_DIGITS:
        raise SpecError(
            f"the pin of {upstream.name} {pin.ref} has commit {pin.commit!r}, "
            f"which is not {_PREFIX_DIGITS} to 40 hex digits",
            hint="correct it in patches/pins.toml",
        )
    if not commit.startswith(wanted):
        raise PinMismatchError(
            f"{upstream.name} {pin.ref} in {location} is commit {commit}, but the pin says {pin.commit}",
            hint="the tag was moved or this is another repository; take upstream's own, or choose a pinned "
            "release (`kvpatch versions` lists them)",
            data={"expected": pin.commit, "actual": commit, "ref": pin.ref, "location": location},
        )
    return True


def version_key(name: str) -> tuple[tuple[int, ...], int, str]:
    """Sorts release names by their numbers; a pre-release (``-rc1``) comes before its release."""
    match = re.search(r"\d+(?:\.\d+)*", name)
    if match is None:
        return ((), 0, name)
    numbers = tuple(int(part) for part in match.group().split("."))
    rest = name[match.end() :]
    return (numbers, 0 if rest else 1, rest)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Release names from oldest to newest."""
    return tuple(sorted(names, key=version_key))


def nearest(wanted: str, names: Sequence[str], count: int = _SHOWN) -> tuple[str, ...]:
    """At most `count` of the names that somebody who typed `wanted` may have meant, best first."""
    bare = wanted.lower().removeprefix("v")
    same = [n for n in names if n.lower().removeprefix("v") == bare]
    alike = difflib.get_close_matches(wanted, names, n=2, cutoff=0.85)
    pool = ordered(names)
    if "-" not in wanted:  # asked for a release: offer no pre-releases while there are releases
        pool = tuple(n for n in pool if version_key(n)[1] == 1) or pool
    key = version_key(wanted)
    place = sum(1 for n in pool if version_key(n) < key) if key[0] else len(pool)
    around = sorted(range(len(pool)), key=lambda i: (abs(i - place + 0.5), i))[:count]
    close = [pool[i] for i in around]
    found = [*same, *close[:2], *alike, *close[2:]]
    return tuple(dict.fromkeys(found))[:count]


def unknown_ref(
    upstream: Upstream, ref: str, names: Sequence[str], location: str, what: str = "tag"
) -> UnknownRefError:
    """The error for a name that the source does not have, saying what it does have."""
    near = nearest(ref, names)
    count = f"{len(names)} {what}{'' if len(names) == 1 else 's'}"
    exists = f"it has {count}; nearest: {', '.join(near)}" if near else f"it has no {what}s at all"
    return UnknownRefError(
        f"{location} has no {upstream.name} {ref}: {exists}",
        hint=f"ask for {near[0]}, or see `kvpatch versions` for what is pinned and tested"
        if near
        else f"name the repository that has {ref} with {upstream.option}",
        data={"ref": ref, "nearest": list(near), "count": len(names), "location": location},
    )
