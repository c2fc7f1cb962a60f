"""The verdict on each hunk, case by case, on generated repositories."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import cast

import pytest
from patched_upstream import Upstream, c_file, git, insert_after

from kvpatch.patching import ApplyReport, HunkReport, PatchFailure, Status, Verdict, apply_series, try_series
from kvpatch.patching.evaluate import check_result, judge
from kvpatch.patching.match import Text
from kvpatch.patching.model import FilePatch, Hunk, Op
from kvpatch.patching.threeway import Placement, edit

FILE = "src/store.c"
HOOK = "hook_alpha();"
BLOCK = b"    alpha_lock(s);\n    ok = store_put(s, n);\n"


@pytest.fixture
def patched(c_upstream: Upstream) -> Upstream:
    """An upstream with one patch of one hunk, made on its present state (the block is at lines 10 and 11)."""
    edit = insert_after("    alpha_lock(s);", f"    {HOOK}")
    c_upstream.make_patch("0001-alpha", {FILE: edit}, [(FILE, HOOK)])
    return c_upstream


def attempt(upstream: Upstream) -> ApplyReport:
    """Try the series on HEAD, without writing and for real: both must judge alike, and failing must change
    nothing.
    """
    tried = try_series(upstream.tree, "HEAD", upstream.patches())
    base, before = upstream.head(), {f: f.read_bytes() for f in upstream.tree.rglob("*.c")}
    if tried.ok:
        applied = apply_series(upstream.tree, base, upstream.patches())
    else:
        with pytest.raises(PatchFailure) as caught:
            apply_series(upstream.tree, base, upstream.patches())
        applied = caught.value.report
        assert caught.value.exit_code == 5
        assert caught.value.data == applied.to_json()
        if applied.commit == base:
            assert {f: f.read_bytes() for f in upstream.tree.rglob("*.c")} == before
    assert [p.status.ok for p in applied.patches] == [p.status.ok for p in tried.patches]
    assert [[h.verdict for h in p.hunks] for p in applied.patches] == [
        [h.verdict for h in p.hunks] for p in tried.patches
    ]
    return applied


def only_hunk(report: ApplyReport) -> HunkReport:
    (patch,) = report.patches
    (hunk,) = patch.hunks
    return hunk


def test_exact(patched: Upstream) -> None:
    hunk = only_hunk(attempt(patched))
    assert (hunk.verdict, hunk.recorded, hunk.line) == (Verdict.EXACT, 10, 10)
    assert patched.read(FILE) == c_file().replace(
        BLOCK, b"    alpha_lock(s);\n    hook_alpha();\n    ok = store_put(s, n);\n"
    )


def test_moved(patched: Upstream) -> None:
    patched.commit({FILE: b"// one\n// two\n" + c_file()})
    report = attempt(patched)
    hunk = only_hunk(report)
    assert (hunk.verdict, hunk.recorded, hunk.line) == (Verdict.MOVED, 10, 12)
    assert f"{FILE}, hunk 1: moved, line 10 -> 12" in "\n".join(report.lines())
    assert patched.read(FILE).count(b"alpha_lock(s);\n    hook_alpha();\n") == 1


def test_moved_with_the_whole_function(patched: Upstream) -> None:
    patched.commit({FILE: c_file(("delta", "gamma", "alpha", "beta"))})
    assert only_hunk(attempt(patched)).verdict is Verdict.MOVED


def test_renamed_function_is_followed(patched: Upstream) -> None:
    patched.commit({FILE: c_file().replace(b"int alpha(struct", b"int omega(struct")})
    assert only_hunk(attempt(patched)).verdict is Verdict.EXACT


@pytest.mark.parametrize("git_would_apply", [True, False])
def test_duplicate_is_refused_naming_all_lines(patched: Upstream, git_would_apply: bool) -> None:
    """Also where one of the copies stands at the recorded line and git itself would apply without a word."""
    copy = b"void other(void)\n{\n" + BLOCK + b"}\n"
    data = c_file() + copy if git_would_apply else copy + c_file()
    patched.commit({FILE: data})
    if git_would_apply:
        git(patched.tree, "apply", "--check", patched.series / "0001-alpha.patch")
    report = attempt(patched)
    hunk = only_hunk(report)
    assert hunk.verdict is Verdict.AMBIGUOUS
    assert hunk.lines == ((10, 66) if git_would_apply else (3, 15))
    assert f"lines {hunk.lines[0]}, {hunk.lines[1]}" in hunk.detail
    assert re.search(r"sed -n '\d+,\d+p' .*store\.c", hunk.next)


def test_already_applied(patched: Upstream) -> None:
    done = patched.read(FILE).replace(
        BLOCK, b"    alpha_lock(s);\n    hook_alpha();\n    ok = store_put(s, n);\n"
    )
    base = patched.commit({FILE: b"// moved\n" + done})
    report = attempt(patched)
    hunk = only_hunk(report)
    assert (hunk.verdict, hunk.line) == (Verdict.ALREADY, 11)
    assert report.patches[0].status is Status.ALREADY
    assert report.ok
    assert report.commit == base


def test_before_and_after_both_there(patched: Upstream) -> None:
    after = b"    alpha_lock(s);\n    hook_alpha();\n    ok = store_put(s, n);\n"
    patched.commit({FILE: c_file() + b"void copy(void)\n{\n" + after + b"}\n"})
    hunk = only_hunk(attempt(patched))
    assert hunk.verdict is Verdict.AMBIGUOUS
    assert hunk.lines == (10, 66)
    assert "both as it was (line 10) and as it is to be (line 66)" in hunk.detail


def test_already_there_twice(patched: Upstream) -> None:
    after = b"    alpha_lock(s);\n    hook_alpha();\n    ok = store_put(s, n);\n"
    patched.commit({FILE: c_file().replace(BLOCK, after) + b"void copy(void)\n{\n" + after + b"}\n"})
    hunk = only_hunk(attempt(patched))
    assert hunk.verdict is Verdict.AMBIGUOUS
    assert "already there 2 times: lines 10, 67" in hunk.detail


def test_partly_applied(c_upstream: Upstream) -> None:
    def edit(data: bytes) -> bytes:
        data = insert_after("    alpha_lock(s);", "    hook_alpha();")(data)
        return insert_after("    beta_lock(s);", "    hook_beta();")(data)

    c_upstream.make_patch("0001-two", {FILE: edit}, [(FILE, "hook_alpha();"), (FILE, "hook_beta();")])
    c_upstream.commit({FILE: insert_after("    beta_lock(s);", "    hook_beta();")(c_file())})
    report = attempt(c_upstream)
    (patch,) = report.patches
    assert patch.status is Status.PARTLY
    assert [hunk.verdict for hunk in patch.hunks] == [Verdict.EXACT, Verdict.ALREADY]
    assert "hunk 2 of 2 already there" in patch.detail
    assert not report.ok


def test_context_changed_names_the_nearest_line(patched: Upstream) -> None:
    patched.commit({FILE: c_file().replace(BLOCK, b"    alpha_lock(s);\n    ok = store_put_all(s, n, 0);\n")})
    report = attempt(patched)
    hunk = only_hunk(report)
    assert hunk.verdict is Verdict.CONTEXT_CHANGED
    assert hunk.anchor is not None
    assert (hunk.anchor.line, hunk.anchor.text) == (10, "alpha_lock(s);")
    assert (hunk.anchor.matched, hunk.anchor.total) == (1, 2)
    assert hunk.anchor.missing == ("    ok = store_put(s, n);",)
    assert "conflict" in hunk.detail
    text = "\n".join(report.lines())
    assert "0001-alpha.patch: FAILED, 0 of 1 hunks fit" in text
    assert f"nearest: {FILE}:10: `alpha_lock(s);` (1 of 2 lines" in text
    assert "not there: `    ok = store_put(s, n);`" in text
    assert "next: sed -n '2,18p'" in text
    assert "0 of 1 patches fit" in text


def test_nearest_by_similarity_when_no_line_is_left(patched: Upstream) -> None:
    data = c_file(("beta",)).replace(b"ok = store_put(s, n);", b"ok = store_put_all(s, n);")
    patched.commit({FILE: data})
    anchor = only_hunk(attempt(patched)).anchor
    assert anchor is not None
    assert anchor.text == "ok = store_put_all(s, n);"
    assert anchor.matched == 0


def test_block_in_another_function_is_refused(patched: Upstream) -> None:
    data = c_file().replace(BLOCK, b"").replace(b"    gamma_lock(s);\n    ok = store_put(s, n);\n", BLOCK)
    patched.commit({FILE: data})
    hunk = only_hunk(attempt(patched))
    assert hunk.verdict is Verdict.OTHER_FUNCTION
    assert hunk.lines == (38,)
    assert "recorded in `int alpha(struct store *s, int n)`, which is still there at line 4" in hunk.detail


def test_block_taken_over_by_an_old_function_is_refused(patched: Upstream) -> None:
    """alpha is gone by name and its block stands in beta, which the base knows as another function."""
    data = c_file(("beta", "gamma", "delta")).replace(
        b"    beta_lock(s);\n    ok = store_put(s, n);\n", BLOCK
    )
    patched.commit({FILE: data})
    hunk = only_hunk(attempt(patched))
    assert hunk.verdict is Verdict.OTHER_FUNCTION
    assert "in `int beta(struct store *s, int n)`" in hunk.detail
    assert "which is gone" in hunk.detail


def test_file_moved(patched: Upstream) -> None:
    patched.commit({FILE: None, "lib/storage.c": b"// new home\n" + c_file()})
    report = attempt(patched)
    hunk = only_hunk(report)
    assert hunk.verdict is Verdict.FILE_MOVED
    assert (hunk.new_path, hunk.line) == ("lib/storage.c", 11)
    assert "git sees a rename" in hunk.detail
    assert hunk.next.startswith("sed -i 's|src/store.c|lib/storage.c|g' ")
    assert report.to_json()["patches"][0]["hunks"][0]["new_path"] == "lib/storage.c"


def test_file_moved_without_its_base(patched: Upstream) -> None:
    """No base commit, so only the lines themselves can tell; the file of the same name wins."""
    file = patched.series / "0001-alpha.patch"
    file.write_bytes(re.sub(rb"Kvpatch-Base: \w+", b"Kvpatch-Base: " + b"1" * 40, file.read_bytes()))
    patched.commit({FILE: None, "lib/store.c": c_file(), "old/copy.c": c_file()})
    hunk = only_hunk(attempt(patched))
    assert hunk.verdict is Verdict.FILE_MOVED
    assert (hunk.new_path, hunk.line) == ("lib/store.c", 10)


def test_moved_file_is_followed_by_the_next_command(patched: Upstream) -> None:
    patched.commit({FILE: None, "lib/store.c": c_file()})
    hunk = only_hunk(attempt(patched))
    subprocess.run(shlex.split(hunk.next), check=True)
    assert only_hunk(attempt(patched)).verdict is Verdict.EXACT


def test_file_gone(patched: Upstream) -> None:
    patched.commit({FILE: None})
    hunk = only_hunk(attempt(patched))
    assert hunk.verdict is Verdict.FILE_GONE
    assert hunk.next


def test_line_endings(patched: Upstream) -> None:
    """A file that became CRLF is refused with its own verdict: no bytes are mixed into it."""
    patched.commit({FILE: c_file().replace(b"\n", b"\r\n")})
    hunk = only_hunk(attempt(patched))
    assert (hunk.verdict, hunk.lines) == (Verdict.LINE_ENDINGS, (10,))
    assert "the patch has LF, the file CRLF" in hunk.detail


def test_crlf_patch_on_crlf_file(upstream: Upstream) -> None:
    data = b"one\r\ntwo\r\nthree\r\n"
    upstream.commit({"f.c": data})
    upstream.make_patch(
        "0001-crlf", {"f.c": lambda d: d.replace(b"two\r\n", b"two\r\nhook();\r\n")}, [("f.c", "hook();")]
    )
    assert only_hunk(attempt(upstream)).verdict is Verdict.EXACT
    assert upstream.read("f.c") == b"one\r\ntwo\r\nhook();\r\nthree\r\n"


@pytest.mark.parametrize("newline_in_patch", [True, False])
@pytest.mark.parametrize("newline_in_file", [True, False])
def test_final_newline(upstream: Upstream, newline_in_patch: bool, newline_in_file: bool) -> None:
    """The last line with and without newline: as recorded it applies, otherwise the verdict says what
    differs.
    """
    bare = b"one\ntwo\nlast"
    upstream.commit({"f.c": bare + b"\n" * newline_in_patch})
    upstream.make_patch(
        "0001-end", {"f.c": lambda d: d.replace(b"two\n", b"two\nhook();\n")}, [("f.c", "hook();")]
    )
    upstream.commit({"f.c": bare + b"\n" * newline_in_file})
    hunk = only_hunk(attempt(upstream))
    if newline_in_patch == newline_in_file:
        assert hunk.verdict is Verdict.EXACT
        assert upstream.read("f.c") == b"one\ntwo\nhook();\nlast" + b"\n" * newline_in_file
    else:
        assert hunk.verdict is Verdict.LINE_ENDINGS
        assert "no newline at the end of the file" in hunk.detail


def test_final_newline_is_added_as_recorded(upstream: Upstream) -> None:
    upstream.commit({"f.c": b"one\ntwo\nthree"})

    def edit(data: bytes) -> bytes:
        return data.replace(b"two\n", b"hook();\n")

    upstream.make_patch("0001-end", {"f.c": edit}, [("f.c", "hook();")])
    assert attempt(upstream).ok
    assert upstream.read("f.c") == b"one\nhook();\nthree"


def test_hook_found_twice(patched: Upstream) -> None:
    """The block is unique, but the hook's line stands in the file already, by whatever hand."""
    patched.commit(
        {FILE: c_file().replace(b"    delta_lock(s);\n", b"    delta_lock(s);\n\thook_alpha();\n")}
    )
    report = attempt(patched)
    (patch,) = report.patches
    assert patch.status is Status.FAILED
    assert patch.hunks[0].verdict is Verdict.EXACT
    assert patch.hooks[0].lines == (11, 57)
    assert "hook found 2 times, not once, lines 11, 57: `hook_alpha();`" in "\n".join(report.lines())


def test_patch_that_repeats_an_earlier_hook(patched: Upstream) -> None:
    edit = insert_after("    beta_lock(s);", f"    {HOOK}")
    patched.make_patch("0002-beta", {FILE: edit}, [(FILE, HOOK)])
    report = attempt(patched)
    assert [patch.status for patch in report.patches] == [Status.APPLIED, Status.FAILED]
    assert report.patches[1].hooks[0].lines == (11, 27)


def test_patch_that_removes_an_earlier_hook(patched: Upstream) -> None:
    base = patched.head()
    git(patched.tree, "am", "-q", patched.series / "0001-alpha.patch")

    def edit(data: bytes) -> bytes:
        return data.replace(b"hook_alpha();", b"hook_omega();")

    patched.make_patch("0002-omega", {FILE: edit}, [(FILE, "hook_omega();")])
    git(patched.tree, "reset", "-q", "--hard", base)
    report = attempt(patched)
    assert [patch.status for patch in report.patches] == [Status.FAILED, Status.FITS]
    assert "a later patch" in report.patches[0].detail
    assert report.patches[0].hooks[0].lines == ()
    assert report.commit == base


def pieces(first: str, second: str) -> FilePatch:
    """Two hunks written as one character a line: ` a`, `+h`, `-x`."""
    hunks = tuple(
        Hunk(
            number=number,
            old_start=1,
            new_start=1,
            heading=b"",
            body=tuple(
                (cast("Op", op), line.encode() + b"\n")
                for op, line in zip(text[::2], text[1::2], strict=True)
            ),
        )
        for number, text in enumerate((first, second), 1)
    )
    return FilePatch(path="f", old_blob="", new_blob="", mode="100644", hunks=hunks)


@pytest.mark.parametrize(
    ("first", "second", "lines", "result"),
    [
        (" a+h x", " x+i b", "axb", "ahxib"),  # sharing a context line is no harm
        (" a+h x b", " x+i b", "axb", None),  # the second reaches into the first
        (" a-x+h b", " x+i b", "axb", None),  # a line both removed and context
        (" a-x+h b", " a-x+i b c", "axbc", None),  # the same line removed twice
    ],
)
def test_hunks_that_meet(first: str, second: str, lines: str, result: str | None) -> None:
    text = Text("".join(f"{line}\n" for line in lines).encode())
    file = pieces(first, second)
    reports = [judge(hunk, "f", text) for hunk in file.hunks]
    assert all(report.verdict.fits for report in reports)
    placed = [Placement(hunk=h, at=(r.line or 0) - 1) for h, r in zip(file.hunks, reports, strict=True)]
    data = edit(text, placed)
    checked = check_result(file, reports, placed, data)
    if result is None:
        assert Verdict.CONTEXT_CHANGED in [report.verdict for report in checked]
    else:
        assert checked == reports
        assert data == "".join(f"{line}\n" for line in result).encode()


def test_symlink_is_not_patched(patched: Upstream) -> None:
    (patched.tree / FILE).unlink()
    (patched.tree / "src/other.c").write_bytes(c_file())
    (patched.tree / FILE).symlink_to("other.c")
    git(patched.tree, "add", "-A")
    git(patched.tree, "commit", "-q", "-m", "link")
    hunk = only_hunk(try_series(patched.tree, "HEAD", patched.patches()))
    assert hunk.verdict is Verdict.FILE_GONE
    assert "mode 120000" in hunk.detail
