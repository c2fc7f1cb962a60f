"""What became of every patch and every hunk, as values, as JSON and as plain lines."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SCHEMA = "kvpatch.apply-report/1"


class Verdict(str, enum.Enum):
    """What was found out about one hunk. The first four fit, the others do not."""

    EXACT = "exact"
    MOVED = "moved"
    THREE_WAY = "3way"
    ALREADY = "already"
    AMBIGUOUS = "ambiguous"
    OTHER_FUNCTION = "other-function"
    LINE_ENDINGS = "line-endings"
    CONTEXT_CHANGED = "context-changed"
    FILE_MOVED = "file-moved"
    FILE_GONE = "file-gone"

    @property
    def fits(self) -> bool:
        return self in (Verdict.EXACT, Verdict.MOVED, Verdict.THREE_WAY, Verdict.ALREADY)


class Status(str, enum.Enum):
    """What became of one patch."""

    APPLIED = "applied"
    ALREADY = "already"
    FITS = "fits"  # would apply, but a patch before it does not
    PARTLY = "partly-applied"
    FAILED = "failed"

    @property
    def ok(self) -> bool:
        return self in (Status.APPLIED, Status.ALREADY, Status.FITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """The place nearest to a lost hunk: a line (1-based) that is really there, and how much of the block
    is.
    """

    line: int
    text: str
    matched: int
    total: int
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HunkReport:
    """One hunk: `recorded` is the line the patch names, `line` where it went, `lines` all candidates
    (1-based).
    """

    number: int
    path: str
    verdict: Verdict
    recorded: int
    line: int | None = None
    lines: tuple[int, ...] = ()
    new_path: str | None = None
    detail: str = ""
    anchor: Anchor | None = None
    next: str = ""

    def to_json(self) -> dict[str, Any]:
        anchor = None
        if self.anchor is not None:
            anchor = {
                "line": self.anchor.line,
                "text": self.anchor.text,
                "matched": self.anchor.matched,
                "total": self.anchor.total,
                "missing": list(self.anchor.missing),
            }
        return {
            "number": self.number,
            "path": self.path,
            "verdict": self.verdict.value,
            "fits": self.verdict.fits,
            "recorded_line": self.recorded,
            "line": self.line,
            "lines": list(self.lines),
            "new_path": self.new_path,
            "detail": self.detail,
            "anchor": anchor,
            "next": self.next,
        }

    def to_lines(self) -> Iterator[str]:
        place = f"  {self.path}, hunk {self.number}: {self.verdict.value}"
        if self.verdict is Verdict.MOVED:
            yield f"{place}, line {self.recorded} -> {self.line}"
        elif self.verdict.fits:
            yield f"{place}, line {self.line}" + (f" ({self.detail})" if self.detail else "")
        else:
            yield f"{place}: {self.detail}"
        if self.anchor is not None:
            yield (
                f"    nearest: {self.path}:{self.anchor.line}: `{self.anchor.text}` "
                f"({self.anchor.matched} of {self.anchor.total} lines of the block stand there)"
            )
            for text in self.anchor.missing:
                yield f"    not there: `{text}`"
        if self.next:
            yield f"    next: {self.next}"


@dataclass(frozen=True, kw_only=True, slots=True)
class HookReport:
    """How often a hook line is in its file after applying (`lines`, 1-based); right is once."""

    path: str
    text: str
    lines: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return len(self.lines) == 1

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "text": self.text, "lines": list(self.lines), "ok": self.ok}


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchReport:
    """One patch. `commit` is the commit it became, None when it was not applied or was there already."""

    name: str
    subject: str
    sha256: str
    status: Status
    hunks: tuple[HunkReport, ...]
    hooks: tuple[HookReport, ...]
    detail: str = ""
    next: str = ""
    commit: str | None = None

    @property
    def fit(self) -> int:
        return sum(hunk.verdict.fits for hunk in self.hunks)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subject": self.subject,
            "sha256": self.sha256,
            "status": self.status.value,
            "ok": self.status.ok,
            "hunks_fit": self.fit,
            "hunks_total": len(self.hunks),
            "hunks": [hunk.to_json() for hunk in self.hunks],
            "hooks": [hook.to_json() for hook in self.hooks],
            "detail": self.detail,
            "next": self.next,
            "commit": self.commit,
        }

    def to_lines(self) -> Iterator[str]:
        status = self.status.value if self.status.ok else self.status.value.upper()
        yield f"{self.name}: {status}, {self.fit} of {len(self.hunks)} hunks fit" + (
            f"; {self.detail}" if self.detail else ""
        )
        for hunk in self.hunks:
            yield from hunk.to_lines()
        for hook in self.hooks:
            if not hook.ok:
                where = f", lines {', '.join(map(str, hook.lines))}" if hook.lines else ""
                yield f"  {hook.path}: hook found {len(hook.lines)} times, not once{where}: `{hook.text}`"
        if self.next:
            yield f"  next: {self.next}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplyReport:
    """The whole series on one base commit. `commit` is what the tree was left at."""

    base_commit: str
    commit: str
    patches: tuple[PatchReport, ...]
    written: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(patch.status.ok for patch in self.patches)

    @property
    def failed(self) -> tuple[PatchReport, ...]:
        return tuple(patch for patch in self.patches if not patch.status.ok)

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable; says the same for the same tree and series, so nothing about this run is in
        it.
        """
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "base_commit": self.base_commit,
            "commit": self.commit,
            "patches_ok": len(self.patches) - len(self.failed),
            "patches_total": len(self.patches),
            "patches": [patch.to_json() for patch in self.patches],
        }

    def lines(self) -> list[str]:
        """Plain text, a line a list item, for people."""
        out = [line for patch in self.patches for line in patch.to_lines()]
        good = len(self.patches) - len(self.failed)
        out.append(f"{good} of {len(self.patches)} patches fit {self.base_commit[:12]}")
        return out
