from __future__ import annotations

from pathlib import Path

import pytest
from patched_upstream import Upstream, git, insert_after

from kvpatch.patching.parse import parse_patch, render_file

HOOK = "hook_alpha();"
EDIT = insert_after("    alpha_lock(s);", f"    {HOOK}")


@pytest.fixture
def patch_file(c_upstream: Upstream) -> Path:
    return c_upstream.make_patch("0001-alpha", {"src/store.c": EDIT}, [("src/store.c", HOOK)])


def codes(file: Path) -> list[str]:
    patch, findings = parse_patch(file)
    assert (patch is None) == bool(findings)
    return [finding.code for finding in findings]


def test_fields(patch_file: Path) -> None:
    patch, findings = parse_patch(patch_file)
    assert findings == []
    assert patch is not None
    assert (patch.name, patch.stem) == ("0001-alpha.patch", "0001-alpha")
    assert patch.subject == "0001-alpha: a call site"
    assert (patch.author, patch.email) == ("Ann Author", "ann@example.org")
    assert (patch.timestamp, patch.zone) == (1785578400, "+0200")
    assert patch.why == "the test needs it"
    assert patch.message.startswith("0001-alpha: a call site\n\nBody.\n")
    (file,) = patch.files
    (hunk,) = file.hunks
    assert hunk.added == (b"    hook_alpha();\n",)
    assert hunk.pre_image == (b"    alpha_lock(s);\n", b"    ok = store_put(s, n);\n")
    assert hunk.heading == b"int alpha(struct store *s, int n)"
    assert (hunk.leading, hunk.trailing, hunk.old_start) == (1, 1, 10)


@pytest.mark.parametrize("word", ["=?bogus?b?eHg=?=", "=?utf-8?q?=ff?="])
def test_a_header_that_cannot_be_decoded_is_a_finding(patch_file: Path, word: str) -> None:
    patch_file.write_bytes(
        patch_file.read_bytes().replace(b"Subject: [PATCH]", f"Subject: {word}".encode(), 1)
    )
    assert "mail" in codes(patch_file)


def test_variant_name(patch_file: Path) -> None:
    other = patch_file.with_name("0001-alpha@2026-04.patch")
    patch_file.rename(other)
    patch, _ = parse_patch(other)
    assert patch is not None
    assert patch.stem == "0001-alpha"


def test_bytes_survive(upstream: Upstream) -> None:
    """CRLF, bytes that are no UTF-8, form feeds and a missing final newline come out as they went in."""
    data = b"one\r\n\xff\xfe \x0c\x85\r\n\x1c\xc3\xa4\r\nlast \xe9"
    upstream.commit({"f.txt": data})
    file = upstream.make_patch(
        "0001-bytes",
        {"f.txt": lambda d: d.replace(b"\x85\r\n", b"\x85\r\nhook();\r\n")},
        [("f.txt", "hook();")],
        context=2,
    )
    patch, findings = parse_patch(file)
    assert findings == []
    assert patch is not None
    (hunk,) = patch.files[0].hunks
    assert b"".join(hunk.pre_image) == data
    assert hunk.post_image[2] == b"hook();\r\n"
    assert hunk.post_image[-1] == b"last \xe9"
    assert file.read_bytes().rstrip().endswith(render_file(patch.files[0]).rstrip())


def test_mail_signature_is_allowed(patch_file: Path) -> None:
    patch_file.write_bytes(patch_file.read_bytes().rstrip(b"\n") + b"\n-- \n2.39.5\n\n")
    assert codes(patch_file) == []


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"Kvpatch-Range: >=0.1", b"Kvpatch-Range: >=zero", "range"),
        (b"Kvpatch-Range: >=0.1\n", b"", "trailer"),
        (b"Kvpatch-Why: the test needs it\n", b"Kvpatch-Why:\n", "trailer"),
        (b"Kvpatch-Why:", b"Kvpatch-Wy: typing error\nKvpatch-Why:", "trailer"),
        (b"Kvpatch-Why:", b"Kvpatch-Why: twice\nKvpatch-Why:", "trailer"),
        (b"Kvpatch-Base: ", b"Kvpatch-Base: main ", "base"),
        (b"Inappropriate [test]", b"Inappropriate", "upstream-status"),
        (b"Hook: src/store.c: hook", b"Hook: src/other.c: hook", "hook"),
        (b"Hook: src/store.c: hook", b"Hook: src/store.c: no_hook", "hook"),
        (b"Hook: src/store.c: hook_alpha();\n", b"Hook: src/store.c\n", "hook"),
        (b"From 0000", b"From 1234", "mail"),
        (b"\nDate: ", b"\nX-Date: ", "date"),
        (b"From: Ann Author <ann@example.org>", b"From: nobody", "author"),
        (b"\nSubject: ", b"\nX-Subject: ", "subject"),
        (b"index ", b"index 0", "index"),
        (b" 100644\n", b" 120000\n", "mode"),
        (b"@@ -10,2 +10,3 @@", b"@@ -10,2 +10,4 @@", "diff"),
        (b"@@ -10,2 +10,3 @@", b"@@ -10,4 +10,5 @@", "diff"),
        (b"\n@@ -10", b"\nwhatever this is\n@@ -10", "diff"),
        (b"+++ b/src/store.c", b"+++ b/src/shop.c", "diff"),
    ],
)
def test_findings(patch_file: Path, old: bytes, new: bytes, code: str) -> None:
    raw = patch_file.read_bytes()
    assert raw.count(old) >= 1
    patch_file.write_bytes(raw.replace(old, new, 1))
    assert code in codes(patch_file)


def test_all_findings_at_once(patch_file: Path) -> None:
    raw = (
        patch_file.read_bytes()
        .replace(b"Kvpatch-Range: >=0.1\n", b"")
        .replace(b"Kvpatch-Why: the test needs it\n", b"")
    )
    patch_file.write_bytes(raw.replace(b"Inappropriate [test]", b"Fine"))
    patch, findings = parse_patch(patch_file)
    assert patch is None
    text = "\n".join(map(str, findings))
    assert "has no Kvpatch-Range" in text
    assert "has no Kvpatch-Why" in text
    assert "'Fine'" in text


def test_converted_patch_file(patch_file: Path) -> None:
    patch_file.write_bytes(patch_file.read_bytes().replace(b"\n", b"\r\n"))
    assert codes(patch_file) == ["crlf"]


def test_not_a_mail(tmp_path: Path) -> None:
    file = tmp_path / "0001-x.patch"
    file.write_bytes(b"hello\n")
    assert codes(file) == ["diff"]
    file.write_bytes(b"From " + b"0" * 40 + b" Mon Sep 17 00:00:00 2001\nSubject: x\n\nbody\n---\nno diff\n")
    assert codes(file) == ["diff"]


def test_bad_name(patch_file: Path) -> None:
    other = patch_file.with_name("alpha.patch")
    patch_file.rename(other)
    assert codes(other) == ["name"]


def test_only_call_sites(c_upstream: Upstream) -> None:
    """New, deleted and renamed files, mode changes and hunks that add nothing are refused."""
    base = c_upstream.commit({"long.c": b"".join(b"line %d\n" % i for i in range(30))})

    def refused(change: dict[str, bytes | None]) -> list[str]:
        file = c_upstream.series / "0009-bad.patch"
        c_upstream.commit(change)
        mail = git(
            c_upstream.tree, "format-patch", "--full-index", "--zero-commit", "-M", "-U1", "--stdout", "-1"
        )
        file.write_text(mail + "\n", encoding="utf-8")
        git(c_upstream.tree, "reset", "-q", "--hard", base)
        return codes(file)

    long = c_upstream.read("long.c")
    assert "new-file" in refused({"new.c": b"x\n"})
    assert "deleted-file" in refused({"README": None})
    assert "rename" in refused({"long.c": None, "longer.c": long})
    assert "call-site" in refused({"long.c": long.replace(b"line 7\n", b"")})
    assert "binary" in refused({"README": b"\0\1\2"})
    assert "context" in refused({"long.c": long + b"more\n"})
    assert "context" in refused({"long.c": b"more\n" + long})


def test_every_hunk_has_a_hook(c_upstream: Upstream) -> None:
    def edit(data: bytes) -> bytes:
        return insert_after("    beta_lock(s);", "    hook_beta();")(EDIT(data))

    file = c_upstream.make_patch("0001-two", {"src/store.c": edit}, [("src/store.c", HOOK)])
    patch, findings = parse_patch(file)
    assert patch is None
    assert [finding.text for finding in findings] == [
        "src/store.c, hunk 2: no Kvpatch-Hook names a line that it adds"
    ]
