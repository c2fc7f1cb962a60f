"""Judging one patch on one tree, in memory: a verdict for every hunk, and the changed files if all of them
fit.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from kvpatch.errors import PatchError
from kvpatch.patching.gitplumbing import Entry, Repository
from kvpatch.patching.locate import find_moved
from kvpatch.patching.match import Text, heading_of, nearest, stray
from kvpatch.patching.model import FilePatch, Hunk, Patch
from kvpatch.patching.report import Anchor, HookReport, HunkReport, PatchReport, Status, Verdict
from kvpatch.patching.threeway import Bases, Placement, edit, merge


class View:
    """A commit's files with changes on top, as one tree to read."""

    def __init__(self, repo: Repository, commit: str) -> None:
        self.repo = repo
        self.commit = commit
        self.entries: Mapping[str, Entry] = repo.entries(commit)
        self._changed: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        """Content of a file. Raises PatchError when its object is missing from the repository."""
        if path in self._changed:
            return self._changed[path]
        return self.repo.blob(self.entries[path].oid)

    def put(self, files: Mapping[str, bytes]) -> None:
        self._changed.update(files)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The report on a patch and, when it applies, the new content of every file it changes."""

    report: PatchReport
    files: Mapping[str, bytes]


def evaluate(patch: Patch, view: View, bases: Bases) -> Outcome:
    """Try a patch on a tree without touching it. Never raises for a patch that does not fit: the report
    says so.
    """
    hunks: list[HunkReport] = []
    changed: dict[str, bytes] = {}
    texts: dict[str, Text] = {}
    for file in patch.files:
        reports, text, data = _evaluate_file(patch, file, view, bases)
        hunks += reports
        if text is not None:
            texts[file.path] = text if data is None else Text(data)
        if data is not None:
            changed[file.path] = data
    already = sum(hunk.verdict is Verdict.ALREADY for hunk in hunks)
    fit = sum(hunk.verdict.fits for hunk in hunks)
    hooks: tuple[HookReport, ...] = ()
    detail = follow = ""
    if 0 < already < len(hunks):
        status = Status.PARTLY
        there = ", ".join(str(hunk.number) for hunk in hunks if hunk.verdict is Verdict.ALREADY)
        detail = f"hunk {there} of {len(hunks)} already there, the others not; it is whole or not at all"
        follow = f"git -C {shlex.quote(str(view.repo.root))} log --oneline -5   # is the base pristine?"
    elif fit < len(hunks):
        status = Status.FAILED
    else:
        hooks = count_hooks(patch, texts)
        status = Status.ALREADY if already == len(hunks) else Status.APPLIED
        bad = [hook for hook in hooks if not hook.ok]
        if bad:
            status = Status.FAILED
            detail = "every hunk fits, but a hook line would not be there exactly once"
            follow = f"make the hook's line unlike any other line of {bad[0].path} in {patch.file}"
    report = PatchReport(
        name=patch.name,
        subject=patch.subject,
        sha256=patch.sha256,
        status=status,
        hunks=tuple(hunks),
        hooks=hooks,
        detail=detail,
        next=follow,
    )
    return Outcome(report=report, files=changed if status is Status.APPLIED else {})


def count_hooks(patch: Patch, texts: Mapping[str, Text]) -> tuple[HookReport, ...]:
    """Where each hook line of the patch stands in the given files."""
    return tuple(
        HookReport(
            path=hook.path, text=hook.line, lines=tuple(i + 1 for i in texts[hook.path].find_line(hook.line))
        )
        for hook in patch.hooks
    )


def _evaluate_file(
    patch: Patch, file: FilePatch, view: View, bases: Bases
) -> tuple[list[HunkReport], Text | None, bytes | None]:
    """Verdicts, the text as it is, and the text as it will be (None when nothing changes or a hunk does
    not fit).
    """
    entry = view.entries.get(file.path)
    if entry is None:
        return _lost_file(patch, file, view, bases), None, None
    if entry.mode not in ("100644", "100755"):
        return _no_file(file, f"is not a regular file (mode {entry.mode})"), None, None
    try:
        text = Text(view.read(file.path))
    except PatchError:
        return _no_file(file, "is in the tree, but this clone lacks its content"), None, None
    reports = [_followed(hunk, judge(hunk, file.path, text), text, patch, file, bases) for hunk in file.hunks]
    lost = [report for report in reports if report.verdict is Verdict.CONTEXT_CHANGED]
    placed = [
        Placement(hunk=hunk, at=report.line - 1)
        for hunk, report in zip(file.hunks, reports, strict=True)
        if report.verdict in (Verdict.EXACT, Verdict.MOVED) and report.line is not None
    ]
    # A merge is worth trying only when it could make the whole file fit.
    if lost and len(lost) + len(placed) == len(reports):
        merged = merge(view.repo, text, file, placed, bases.contents(patch, file))
        for i, (hunk, report) in enumerate(zip(file.hunks, reports, strict=True)):
            if hunk.number in merged.at and not merged.reasons:
                at = merged.at[hunk.number]
                placed.append(Placement(hunk=hunk, at=at))
                detail = f"recorded line {report.recorded}; context around it has changed"
                reports[i] = dataclasses.replace(
                    report, verdict=Verdict.THREE_WAY, line=at + 1, detail=detail
                )
            elif hunk.number in merged.reasons:
                reports[i] = dataclasses.replace(
                    report, detail=f"{report.detail}; {merged.reasons[hunk.number]}"
                )
    data: bytes | None = None
    if all(report.verdict.fits for report in reports) and placed:
        data = edit(text, placed)
        reports = check_result(file, reports, placed, data)
        if not all(report.verdict.fits for report in reports):
            data = None
    reports = [_advise(patch, view, text, hunk, r) for hunk, r in zip(file.hunks, reports, strict=True)]
    return reports, text, data


def judge(hunk: Hunk, path: str, text: Text) -> HunkReport:
    """The verdict from counting alone. CONTEXT_CHANGED here means: found nowhere, a merge may still place
    it.
    """

    def report(verdict: Verdict, at: list[int], detail: str = "") -> HunkReport:
        return HunkReport(
            number=hunk.number,
            path=path,
            verdict=verdict,
            recorded=hunk.old_start,
            line=at[0] + 1 if len(at) == 1 else None,
            lines=tuple(i + 1 for i in at),
            detail=detail,
        )

    before, after = text.find(hunk.pre_image), text.find(hunk.post_image)
    if before and after:
        detail = (
            f"the block is there both as it was (line {_numbers(before)}) and as it is to be "
            f"(line {_numbers(after)})"
        )
        return report(Verdict.AMBIGUOUS, sorted(before + after), detail)
    if len(after) == 1:
        return report(Verdict.ALREADY, after)
    if after:
        return report(Verdict.AMBIGUOUS, after, f"already there {len(after)} times: lines {_numbers(after)}")
    if len(before) > 1:
        detail = f"the block stands {len(before)} times in the file: lines {_numbers(before)}"
        return report(Verdict.AMBIGUOUS, before, detail)
    if len(before) == 1:
        wrong = stray(text, hunk, before[0])
        if wrong is not None and wrong.recorded is not None:
            detail = (
                f"the block stands at line {before[0] + 1}, "
                f"in `{_show(heading_of(text.lines[wrong.owner]))}`, but was recorded in "
                f"`{_show(hunk.heading)}`, which is still there at line {wrong.recorded + 1}"
            )
            return report(Verdict.OTHER_FUNCTION, before, detail)
        return report(Verdict.EXACT if before[0] + 1 == hunk.old_start else Verdict.MOVED, before)
    like = text.find_ignoring_endings(hunk.pre_image)
    if like:
        ends = _endings(text, hunk, like[0])
        detail = f"the block at line {_numbers(like)} differs only in how lines end: {ends}"
        return report(Verdict.LINE_ENDINGS, like, detail)
    return report(Verdict.CONTEXT_CHANGED, [], "the block is not in the file")


def _followed(
    hunk: Hunk, report: HunkReport, text: Text, patch: Patch, file: FilePatch, bases: Bases
) -> HunkReport:
    """A unique block whose function has no line of its old name left is followed, as into a renamed function.

    Unless it now stands in what was another function all along, which only the content it was made on can
    tell.
    """
    if report.verdict not in (Verdict.EXACT, Verdict.MOVED) or report.line is None:
        return report
    wrong = stray(text, hunk, report.line - 1)
    if wrong is None:
        return report
    heading = heading_of(text.lines[wrong.owner])
    base = next(bases.contents(patch, file), None)
    if base is None or not any(heading_of(line) == heading for line in Text(base).lines):
        return report
    detail = (
        f"the block stands at line {report.line}, in `{_show(heading)}`, but was recorded in "
        f"`{_show(hunk.heading)}`, which is gone"
    )
    return dataclasses.replace(report, verdict=Verdict.OTHER_FUNCTION, line=None, detail=detail)


def _endings(text: Text, hunk: Hunk, at: int) -> str:
    pre = hunk.pre_image
    here = text.lines[at : at + len(pre)]
    for ours, theirs in zip(pre, here, strict=True):
        if ours != theirs:
            return f"the patch has {_ending(ours)}, the file {_ending(theirs)}"
    return "no difference"


def _ending(line: bytes) -> str:
    if line.endswith(b"\r\n"):
        return "CRLF"
    return "LF" if line.endswith(b"\n") else "no newline at the end of the file"


def check_result(
    file: FilePatch, reports: list[HunkReport], placed: list[Placement], data: bytes | None
) -> list[HunkReport]:
    """The changed blocks must each stand exactly once in the result; else the place was not the only one."""
    if data is None:
        why = "two hunks of the patch would change the same lines"
        return [
            dataclasses.replace(report, verdict=Verdict.CONTEXT_CHANGED, detail=why) for report in reports
        ]
    text = Text(data)
    checked: list[HunkReport] = []
    for hunk, report in zip(file.hunks, reports, strict=True):
        if report.verdict in (Verdict.EXACT, Verdict.MOVED):
            found = text.find(hunk.post_image)
        elif report.verdict is Verdict.THREE_WAY:
            place = next(p for p in placed if p.hunk.number == hunk.number)
            grown = sum(
                len(change.added) - change.removed
                for other in placed
                for change in other.hunk.edits()
                if other.at + change.offset < place.at + hunk.leading
            )
            start = max(0, place.at + grown)
            found = text.find(text.lines[start : place.at + grown + len(hunk.post_image)])
        else:
            checked.append(report)
            continue
        if len(found) == 1:
            checked.append(report)
            continue
        verdict = Verdict.AMBIGUOUS if found else Verdict.CONTEXT_CHANGED
        detail = (
            f"after applying, the block would stand {len(found)} times: lines {_numbers(found)}"
            if found
            else "after applying, the block would not stand as the patch says: another hunk reaches into it"
        )
        lines = tuple(i + 1 for i in found)
        checked.append(dataclasses.replace(report, verdict=verdict, line=None, lines=lines, detail=detail))
    return checked


def _advise(patch: Patch, view: View, text: Text, hunk: Hunk, report: HunkReport) -> HunkReport:
    """Add the nearest anchor and the next command to a verdict that does not fit."""
    if report.verdict.fits:
        return report
    target = shlex.quote(str(view.repo.root / report.path))
    where = f"hunk {hunk.number} of {patch.file}"
    anchor = None
    show = f"sed -n '{_around(report.lines[0])}p' {target}" if report.lines else f"less {target}"
    if report.verdict is Verdict.CONTEXT_CHANGED:
        near = nearest(text, hunk.pre_image)
        if near is not None:
            anchor = Anchor(
                line=near.index + 1,
                text=_show(text.lines[near.index].strip()),
                matched=near.matched,
                total=near.total,
                missing=tuple(_show(line) for line in near.missing),
            )
            show = f"sed -n '{_around(anchor.line)}p' {target}"
        follow = f"{show}   # then rewrite {where} to fit, or add an @range variant"
    elif report.verdict is Verdict.AMBIGUOUS:
        follow = f"{show}   # then give {where} more context, until it stands once"
    elif report.verdict is Verdict.OTHER_FUNCTION:
        follow = f"{show}   # if it belongs there now, make {where} anew; if not, correct its context"
    else:
        follow = (
            f"file {target}   # check the source out without line-ending conversion, or make {where} anew"
        )
    return dataclasses.replace(report, anchor=anchor, next=follow)


def _no_file(file: FilePatch, why: str) -> list[HunkReport]:
    return [
        HunkReport(
            number=hunk.number,
            path=file.path,
            verdict=Verdict.FILE_GONE,
            recorded=hunk.old_start,
            detail=f"{file.path} {why}",
        )
        for hunk in file.hunks
    ]


def _lost_file(patch: Patch, file: FilePatch, view: View, bases: Bases) -> list[HunkReport]:
    moved = find_moved(file, view.repo, view.commit, set(view.entries), bases.commit(patch))
    if moved is None:
        follow = (
            f"git -C {shlex.quote(str(view.repo.root))} ls-files   # which file took over from {file.path}?"
        )
        gone = _no_file(file, "is not in the tree, and no other file holds these lines")
        return [dataclasses.replace(report, next=follow) for report in gone]
    follow = f"sed -i 's|{file.path}|{moved.path}|g' {shlex.quote(str(patch.file))}"
    return [
        HunkReport(
            number=hunk.number,
            path=file.path,
            verdict=Verdict.FILE_MOVED,
            recorded=hunk.old_start,
            new_path=moved.path,
            line=moved.lines.get(hunk.number),
            detail=f"{file.path} is gone; its content is now in {moved.path} ({moved.how})",
            next=follow,
        )
        for hunk in file.hunks
    ]


def _numbers(indices: list[int]) -> str:
    return ", ".join(str(i + 1) for i in indices)


def _around(line: int) -> str:
    return f"{max(1, line - 8)},{line + 8}"


def _show(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r\n")
