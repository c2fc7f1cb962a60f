"""Applying a series: every patch judged, the good ones committed, the work tree brought to the result."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from kvpatch import paths
from kvpatch.errors import PatchError, guard
from kvpatch.patching.errors import PatchFailure
from kvpatch.patching.evaluate import View, count_hooks, evaluate
from kvpatch.patching.gitplumbing import Entry, Repository
from kvpatch.patching.match import Text
from kvpatch.patching.model import Patch
from kvpatch.patching.parse import render_hunk
from kvpatch.patching.report import ApplyReport, PatchReport, Status
from kvpatch.patching.threeway import Bases
from kvpatch.patching.worktree import WorkTree

FetchBase = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What a series would do to a commit: the reports, and the changed files of every patch that fits, by
    name.
    """

    reports: tuple[PatchReport, ...]
    files: Mapping[str, Mapping[str, bytes]]


def try_series(
    repo: Path, base_commit: str, patches: Sequence[Patch], *, fetch_base: FetchBase | None = None
) -> ApplyReport:
    """Judge a series on a commit without writing anything: no file, no commit, no reference.

    A patch that fails does not end it: the later ones are judged on the tree with all those before them that
    fit. `fetch_base` is called at most once for each base commit that a 3-way merge needs and the repository
    lacks.
    """
    repository = Repository(repo)
    base = _commit(repository, base_commit)
    trial = _try(repository, base, patches, fetch_base)
    fits = tuple(
        dataclasses.replace(report, status=Status.FITS) if report.status is Status.APPLIED else report
        for report in trial.reports
    )
    return ApplyReport(base_commit=base, commit=base, patches=fits)


def apply_series(
    repo: Path,
    base_commit: str,
    patches: Sequence[Patch],
    *,
    fetch_base: FetchBase | None = None,
    discard: bool = False,
) -> ApplyReport:
    """Apply `patches` to `base_commit`, one commit each, and leave `repo` (a git work tree) at the result.

    The same base and patches give the same commit names. HEAD is left detached at the last commit; of the
    files only those whose bytes differ are written, so applying again touches nothing. With `discard`, edits
    made by hand in tracked files are given up.

    Raises PatchFailure, with a report on all patches, when any of them does not fit: the tree is then at the
    last good commit before the first failure, and `.kvpatch/` in it holds report.json and the hunks that did
    not fit under rejects/. Raises DirtyTreeError when edits or commits made by hand would be lost, PatchError
    when git fails or another process is applying patches here, DiskFullError or AccessError when files cannot
    be written.
    """
    repository = Repository(repo)
    base = _commit(repository, base_commit)
    tree = WorkTree(repository)
    tree.state.mkdir(exist_ok=True)
    try:
        with filelock.FileLock(tree.state / "lock", timeout=0), guard("write the patched files", repo):
            return _apply(repository, tree, base, patches, fetch_base, discard=discard)
    except filelock.Timeout as error:
        raise PatchError(
            f"another kvpatch is applying patches in {repo}", hint="Wait for it, or use another --out."
        ) from error


def _apply(
    repository: Repository,
    tree: WorkTree,
    base: str,
    patches: Sequence[Patch],
    fetch_base: FetchBase | None,
    *,
    discard: bool,
) -> ApplyReport:
    tree.prepare()
    trial = _try(repository, base, patches, fetch_base)
    good = base
    reports: list[PatchReport] = []
    stopped = False
    for patch, report in zip(patches, trial.reports, strict=True):
        stopped = stopped or not report.status.ok
        if report.status is Status.APPLIED:
            if stopped:
                report = dataclasses.replace(report, status=Status.FITS)
            else:
                changed = trial.files[patch.name]
                good = _commit_patch(repository, good, patch, changed, repository.entries(base))
                report = dataclasses.replace(report, commit=good)
        reports.append(report)
    # The hooks' files are checked against both ends, so that a tree from an interrupted run is not called
    # edited.
    loose = tree.check_clean((base, good), discard=discard)
    written = tree.move_to(good, loose)
    report_all = ApplyReport(base_commit=base, commit=good, patches=tuple(reports), written=written)
    _write_state(tree.state, report_all, patches)
    if report_all.ok:
        return report_all
    first = report_all.failed[0]
    names = ", ".join(report.name for report in report_all.failed)
    verdicts = "\n".join(line for report in report_all.failed for line in report.to_lines())
    raise PatchFailure(
        f"{len(report_all.failed)} of {len(patches)} patches do not fit {base[:12]}: {names}; "
        f"{tree.root} is left at the last good commit, {good[:12]}\n{verdicts}",
        report_all,
        hint=next((hunk.next for hunk in first.hunks if hunk.next), "") or first.next or None,
    )


def _try(repository: Repository, base: str, patches: Sequence[Patch], fetch_base: FetchBase | None) -> Trial:
    view = View(repository, base)
    bases = Bases(repository, fetch_base, patches)
    reports: list[PatchReport] = []
    files: dict[str, Mapping[str, bytes]] = {}
    for patch in patches:
        outcome = evaluate(patch, view, bases)
        view.put(outcome.files)
        files[patch.name] = outcome.files
        reports.append(outcome.report)
    # A later patch can repeat or remove the hook of an earlier one: count once more in the final tree.
    for i, (patch, report) in enumerate(zip(patches, reports, strict=True)):
        if not report.status.ok:
            continue
        hooks = count_hooks(patch, {file.path: Text(view.read(file.path)) for file in patch.files})
        if not all(hook.ok for hook in hooks):
            detail = "a later patch of the series repeats or removes a hook line of this one"
            follow = f"grep -n 'Kvpatch-Hook' {' '.join(shlex.quote(str(p.file)) for p in patches)}"
            reports[i] = dataclasses.replace(
                report, status=Status.FAILED, hooks=hooks, detail=detail, next=follow
            )
    return Trial(reports=tuple(reports), files=files)


def _commit(repository: Repository, name: str) -> str:
    found = repository.commit_of(name)
    if found is None:
        raise PatchError(f"{repository.root} has no commit {name}", hint="Fetch the source again.")
    return found


def _commit_patch(
    repository: Repository, parent: str, patch: Patch, files: Mapping[str, bytes], modes: Mapping[str, Entry]
) -> str:
    entries = {
        path: Entry(mode=modes[path].mode, oid=repository.write_blob(data)) for path, data in files.items()
    }
    author = {"name": patch.author, "email": patch.email, "date": f"@{patch.timestamp} {patch.zone}"}
    return repository.commit(parent, entries, message=patch.message, author=author)


def _write_state(state: Path, report: ApplyReport, patches: Sequence[Patch]) -> None:
    _write(state / "report.json", json.dumps(report.to_json(), indent=2).encode() + b"\n")
    rejects = state / "rejects"
    shutil.rmtree(rejects, ignore_errors=True)
    for patch, result in zip(patches, report.patches, strict=True):
        if result.status.ok:
            continue
        _write(rejects / patch.name, _reject(patch, result))


def _reject(patch: Patch, result: PatchReport) -> bytes:
    """The report on a patch as text, then the hunks that did not fit, as a diff that can be edited and
    tried.
    """
    out = [b"".join(b"# " + line.encode() + b"\n" for line in result.to_lines())]
    verdicts = {hunk.number: hunk.verdict for hunk in result.hunks}
    for file in patch.files:
        lost = [hunk for hunk in file.hunks if not verdicts[hunk.number].fits]
        if lost:
            name = file.path.encode()
            out.append(b"diff --git a/%s b/%s\n--- a/%s\n+++ b/%s\n" % (name, name, name, name))
            out += [render_hunk(hunk) for hunk in lost]
    return b"".join(out)


def _write(file: Path, data: bytes) -> None:
    if not file.exists() or file.read_bytes() != data:
        paths.write_whole(file, data)
