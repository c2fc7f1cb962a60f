"""3-way merges: where they help, where git alone would be wrong, and bases fetched on demand."""

from __future__ import annotations

from pathlib import Path

import pytest
from patched_upstream import Upstream, c_file, git, insert_after

from kvpatch.patching import ApplyReport, Verdict, apply_series, try_series

FILE = "src/store.c"
HOOK = "hook_alpha();"
EDIT = insert_after("    alpha_lock(s);", f"    {HOOK}")


@pytest.fixture
def patched(c_upstream: Upstream) -> Upstream:
    """One patch with three lines of context, so that an outer one can change."""
    c_upstream.make_patch("0001-alpha", {FILE: EDIT}, [(FILE, HOOK)], context=3)
    return c_upstream


def outer_change(data: bytes) -> bytes:
    """Change a context line two lines before the change of alpha, in alpha alone."""
    old = b"        return -1;\n    }\n    alpha_lock(s);\n"
    assert data.count(old) == 1
    return data.replace(old, b"        return -EINVAL;\n    }\n    alpha_lock(s);\n")


def verdicts(report: ApplyReport) -> list[Verdict]:
    return [hunk.verdict for patch in report.patches for hunk in patch.hunks]


def test_outer_context_changed(patched: Upstream) -> None:
    patched.commit({FILE: b"// moved\n" + outer_change(c_file())})
    report = apply_series(patched.tree, "HEAD", patched.patches())
    assert verdicts(report) == [Verdict.THREE_WAY]
    assert report.patches[0].hunks[0].line == 9
    assert patched.read(FILE) == b"// moved\n" + EDIT(outer_change(c_file()))


def test_shallow_clone_fetches_the_base(patched: Upstream, tmp_path: Path) -> None:
    base = patched.head()
    patched.commit({FILE: outer_change(c_file())})
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{patched.tree}", shallow)
    asked: list[str] = []

    def fetch(commit: str) -> bool:
        asked.append(commit)
        git(shallow, "fetch", "-q", "--depth", "1", "origin", commit)
        return True

    without = try_series(shallow, "HEAD", patched.patches())
    assert verdicts(without) == [Verdict.CONTEXT_CHANGED]
    assert "not to be had" in without.patches[0].hunks[0].detail
    report = apply_series(shallow, "HEAD", patched.patches(), fetch_base=fetch)
    assert asked == [base]
    assert verdicts(report) == [Verdict.THREE_WAY]
    assert (shallow / FILE).read_bytes() == EDIT(outer_change(c_file()))


def test_base_that_cannot_be_fetched(patched: Upstream, tmp_path: Path) -> None:
    patched.commit({FILE: outer_change(c_file())})
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{patched.tree}", shallow)
    asked: list[str] = []

    def fetch(commit: str) -> bool:
        asked.append(commit)
        return False

    report = try_series(shallow, "HEAD", patched.patches(), fetch_base=fetch)
    assert verdicts(report) == [Verdict.CONTEXT_CHANGED]
    assert len(asked) == 1


def test_base_is_not_fetched_for_nothing(patched: Upstream) -> None:
    def fetch(commit: str) -> bool:
        raise AssertionError(commit)

    assert verdicts(apply_series(patched.tree, "HEAD", patched.patches(), fetch_base=fetch)) == [
        Verdict.EXACT
    ]


def test_later_patch_of_the_same_file(patched: Upstream) -> None:
    """Its recorded blob is one that no clone holds; the base is made from the base commit and the earlier
    patch.
    """
    base = patched.head()
    git(patched.tree, "am", "-q", patched.series / "0001-alpha.patch")
    beta = insert_after("    beta_lock(s);", "    hook_beta();")
    file = patched.make_patch("0002-beta", {FILE: beta}, [(FILE, "hook_beta();")], context=3)
    stacked = patched.head()
    file.write_bytes(file.read_bytes().replace(stacked.encode(), base.encode()))
    git(patched.tree, "reset", "-q", "--hard", base)
    git(patched.tree, "reflog", "expire", "--expire=now", "--all")
    git(patched.tree, "gc", "-q", "--prune=now")
    old = b"        return -1;\n    }\n    beta_lock(s);\n"
    patched.commit({FILE: c_file().replace(old, old.replace(b"-1", b"-7"))})
    report = apply_series(patched.tree, "HEAD", patched.patches())
    assert verdicts(report) == [Verdict.EXACT, Verdict.THREE_WAY]


def test_merge_into_a_lookalike_is_refused(patched: Upstream) -> None:
    """alpha is gone and a lookalike took its place: git merges without a conflict, into the wrong
    function.
    """
    lookalike = outer_change(c_file()).replace(
        b"int alpha(struct store *s, int n)", b"int fresh(struct store *s)"
    )
    base = git(patched.tree, "rev-parse", "HEAD:" + FILE)
    new = patched.commit({FILE: lookalike})
    theirs = patched.root / "theirs"
    ours = patched.root / "ours"
    origin = patched.root / "base"
    origin.write_text(git(patched.tree, "cat-file", "blob", base) + "\n", encoding="utf-8")
    theirs.write_bytes(EDIT(c_file()))
    ours.write_bytes(lookalike)
    assert HOOK in git(patched.tree, "merge-file", "-p", ours, origin, theirs)
    report = try_series(patched.tree, new, patched.patches())
    assert verdicts(report) == [Verdict.CONTEXT_CHANGED]
    assert "its function is gone" in report.patches[0].hunks[0].detail


def test_merge_at_an_ambiguous_place_is_refused(patched: Upstream) -> None:
    """The lines right beside the change stand twice in the function: a merge would choose one of them."""
    old = b"        return -1;\n    }\n    alpha_lock(s);\n    ok = store_put(s, n);\n"
    assert old in c_file()
    twice = (
        old.replace(b"-1", b"-7") + b"    alpha_unlock(s);\n    alpha_lock(s);\n    ok = store_put(s, n);\n"
    )
    data = c_file().replace(old, twice)
    patched.commit({FILE: data})
    report = try_series(patched.tree, "HEAD", patched.patches())
    assert verdicts(report) == [Verdict.CONTEXT_CHANGED]
    assert "more than once in its function at line 4: lines 10, 13" in report.patches[0].hunks[0].detail


def test_one_lost_hunk_of_several(c_upstream: Upstream) -> None:
    """Hunks that stand keep their own verdict beside one that needed the merge."""

    def edit(data: bytes) -> bytes:
        return insert_after("    delta_lock(s);", "    hook_delta();")(EDIT(data))

    hooks = [(FILE, HOOK), (FILE, "hook_delta();")]
    c_upstream.make_patch("0001-two", {FILE: edit}, hooks, context=3)
    c_upstream.commit({FILE: b"\n" + outer_change(c_file())})
    report = apply_series(c_upstream.tree, "HEAD", c_upstream.patches())
    assert verdicts(report) == [Verdict.THREE_WAY, Verdict.MOVED]
    assert c_upstream.read(FILE) == b"\n" + edit(outer_change(c_file()))
