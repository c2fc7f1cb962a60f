"""From a format-patch mail file to a `Patch`, with every finding on the way.

unidiff parses the diff. The result is rendered again and must equal the file's bytes, so that a line which
unidiff skips or reads differently from git is a finding and never a silently smaller patch.
"""

from __future__ import annotations

import email.errors
import email.header
import email.utils
import hashlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import unidiff.errors
import unidiff.patch

from kvpatch.patching.errors import Finding
from kvpatch.patching.model import FilePatch, Hook, Hunk, Op, Patch
from kvpatch.patching.ranges import Range, RangeError, parse_range

NAME = re.compile(r"(?P<stem>\d{4}-[A-Za-z0-9][A-Za-z0-9._-]*?)(?:@[A-Za-z0-9][A-Za-z0-9._-]*)?\.patch")
_MAGIC = b"From " + b"0" * 40 + b" Mon Sep 17 00:00:00 2001"
_TRAILER = re.compile(r"(Kvpatch-[A-Za-z0-9-]+|Upstream-Status):\s*(.*)")
_KNOWN = ("Kvpatch-Range", "Kvpatch-Base", "Kvpatch-Why", "Kvpatch-Hook", "Upstream-Status")
_BASE = re.compile(r"[0-9a-f]{9,40}|b\d+|v\d+\.\d+\.\d+\S*")
# The states and their spelling are Yocto's (OpenEmbedded "Upstream-Status" patch tag).
_STATUS = re.compile(
    r"Pending(?: \[.+\])?|Submitted \[.+\]|Denied(?: \[.+\])?|Inappropriate \[.+\]|Backport \[.+\]"
    r"|Inactive-Upstream \[.+\]"
)
_REFUSED = (
    (
        "new file mode",
        "new-file",
        "makes a new file; new files come from templates, a patch only adds call sites",
    ),
    ("deleted file mode", "deleted-file", "deletes a file; a patch only adds call sites"),
    ("rename from", "rename", "renames a file; a patch only adds call sites"),
    ("copy from", "rename", "copies a file; a patch only adds call sites"),
    ("old mode", "mode-change", "changes a file's mode; a patch only adds call sites"),
    ("GIT binary patch", "binary", "changes a binary file"),
    ("Binary files", "binary", "changes a binary file"),
)


@dataclass(slots=True)
class _Draft:
    """What has been read so far of one file."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def find(self, code: str, text: str, line: int | None = None) -> None:
        self.findings.append(Finding(file=self.name, line=line, code=code, text=text))


def parse_patch(file: Path) -> tuple[Patch | None, list[Finding]]:
    """Read one patch file. The patch is None exactly when there are findings; all of them are returned."""
    draft = _Draft(name=file.name)
    try:
        raw = file.read_bytes()
    except OSError as error:
        draft.find("unreadable", f"cannot be read: {error.strerror}")
        return None, draft.findings
    found = NAME.fullmatch(file.name)
    if found is None:
        draft.find("name", "a patch is named NNNN-name.patch, a variant NNNN-name@range.patch")
    newlines = raw.count(b"\n")
    if newlines and raw.count(b"\r\n") == newlines:
        draft.find(
            "crlf", "every line ends in CRLF: the patch file itself was converted, at checkout perhaps"
        )
        return None, draft.findings
    # format-patch writes `---` before the diff only when a diffstat follows; git am goes by either line.
    diff_at = _line_start(raw, b"diff --git ")
    if diff_at is None:
        draft.find("diff", "holds no diff: not a format-patch mail")
        return None, draft.findings
    mail = raw[: min(diff_at, _line_start(raw, b"---\n") or diff_at)]
    first_line, _, head = mail.partition(b"\n")
    if first_line != _MAGIC:
        draft.find("mail", "does not begin with the zero commit of format-patch --zero-commit", 1)
        head = mail
    header_block, _, body_bytes = head.partition(b"\n\n")
    _read_headers(draft, header_block)
    body = _read_body(draft, body_bytes, 2 + head[: len(header_block)].count(b"\n") + 2)
    files = _read_diff(draft, raw[diff_at:], raw[:diff_at].count(b"\n") + 1)
    hooks = _read_hooks(draft, files)
    author, address, when = _read_author(draft)
    span = _read_range(draft)
    base = _single(draft, "Kvpatch-Base")
    if base and not _BASE.fullmatch(base):
        draft.find(
            "base", f"Kvpatch-Base {base!r} is no commit (9 to 40 hex digits), build (b1234) or tag (v1.2.3)"
        )
    why = _single(draft, "Kvpatch-Why")
    status = _single(draft, "Upstream-Status")
    if status and not _STATUS.fullmatch(status):
        draft.find(
            "upstream-status",
            f"Upstream-Status {status!r} is none of Pending, Submitted [where], Denied, "
            "Inappropriate [reason], Backport [commit], Inactive-Upstream [reason]",
        )
    subject = re.sub(r"^\[PATCH[^\]]*\]\s*", "", draft.headers.get("subject", ""))
    if not subject:
        draft.find("subject", "has no Subject")
    if draft.findings or found is None or span is None or when is None:
        return None, draft.findings
    patch = Patch(
        name=file.name,
        stem=found.group("stem"),
        file=file,
        sha256=hashlib.sha256(raw).hexdigest(),
        subject=subject,
        message=f"{subject}\n\n{body.strip()}\n",
        author=author,
        email=address,
        timestamp=when[0],
        zone=when[1],
        range=span,
        base=base,
        why=why,
        upstream_status=status,
        hooks=hooks,
        files=files,
    )
    return patch, []


def _line_start(raw: bytes, start: bytes) -> int | None:
    found = raw.find(b"\n" + start)
    return None if found < 0 else found + 1


def _read_headers(draft: _Draft, block: bytes) -> None:
    text = re.sub(r"\n[ \t]+", " ", block.decode("utf-8", "replace"))
    for line in text.split("\n"):
        name, colon, value = line.partition(":")
        if not colon:
            continue
        try:
            decoded = email.header.make_header(email.header.decode_header(value.strip()))
        except (email.errors.HeaderParseError, LookupError, UnicodeError) as error:
            draft.find("mail", f"header {name} is encoded in a way that cannot be read: {error}")
            continue
        draft.headers[name.lower()] = str(decoded)
    encoding = draft.headers.get("content-transfer-encoding", "8bit").lower()
    if encoding not in ("7bit", "8bit", "binary"):
        draft.find("mail", f"is encoded as {encoding}; kvpatch reads plain format-patch output only")


def _read_body(draft: _Draft, data: bytes, first_line: int) -> str:
    try:
        body = data.decode("utf-8")
    except UnicodeDecodeError:
        draft.find("mail", "the message is not UTF-8")
        return ""
    for number, line in enumerate(body.split("\n"), first_line):
        found = _TRAILER.fullmatch(line.rstrip())
        if found is None:
            continue
        if found.group(1) in _KNOWN:
            draft.trailers.setdefault(found.group(1), []).append((number, found.group(2)))
        else:
            draft.find("trailer", f"unknown trailer {found.group(1)}; known are {', '.join(_KNOWN)}", number)
    return body


def _single(draft: _Draft, name: str) -> str:
    values = draft.trailers.get(name, [])
    if not values or not values[0][1]:
        draft.find("trailer", f"has no {name}", values[0][0] if values else None)
        return ""
    for number, _ in values[1:]:
        draft.find("trailer", f"has more than one {name}", number)
    return values[0][1]


def _read_range(draft: _Draft) -> Range | None:
    text = _single(draft, "Kvpatch-Range")
    if not text:
        return None
    try:
        return parse_range(text)
    except RangeError as error:
        draft.find("range", f"Kvpatch-Range: {error}", draft.trailers["Kvpatch-Range"][0][0])
        return None


def _read_author(draft: _Draft) -> tuple[str, str, tuple[int, str] | None]:
    author, address = email.utils.parseaddr(draft.headers.get("from", ""))
    if not author or "@" not in address:
        draft.find("author", "has no From: Name <address>")
    try:
        when = email.utils.parsedate_to_datetime(draft.headers.get("date", ""))
    except (ValueError, TypeError, OverflowError):
        when = None
    if when is None or when.tzinfo is None:
        draft.find("date", "has no Date with a time zone")
        return author, address, None
    return author, address, (int(when.timestamp()), when.strftime("%z")[:5])


def _read_diff(draft: _Draft, diff: bytes, first_line: int) -> tuple[FilePatch, ...]:
    # The optional mail signature that format-patch appends is not part of the diff.
    diff = re.sub(rb"^-- \n[^\n]*\n*\Z", b"", diff, flags=re.MULTILINE)
    refused = False
    # Lines of a hunk begin with a blank or a sign, so these can only be headers.
    for number, line in enumerate(diff.split(b"\n"), first_line):
        for prefix, code, text in _REFUSED:
            if line.startswith(prefix.encode()):
                draft.find(code, text, number)
                refused = True
    try:
        # latin-1 maps every byte to one character and back, so nothing is lost whatever the file's encoding.
        parsed = unidiff.patch.PatchSet(io.StringIO(diff.decode("latin-1"), newline="\n"))
    except unidiff.errors.UnidiffParseError as error:
        draft.find("diff", f"the diff cannot be parsed: {error}", first_line)
        return ()
    files: list[FilePatch] = []
    number = 0
    for part in parsed:
        info = [str(line) for line in part.patch_info or ()]
        index = next((m for line in info if (m := re.match(r"index (\S+?)\.\.(\S+?) (\d{6})$", line))), None)
        if index is None or len(index.group(1)) != 40 or len(index.group(2)) != 40:
            if not refused:
                draft.find(
                    "index",
                    f"{part.path}: no index line with full object names; use format-patch --full-index",
                )
            refused = True
            continue
        if index.group(3) not in ("100644", "100755"):
            draft.find("mode", f"{part.path}: mode {index.group(3)} is not that of a regular file")
        hunks: list[Hunk] = []
        for parsed_hunk in part:
            number += 1
            hunks.append(_hunk(parsed_hunk, number))
        files.append(
            FilePatch(
                path=part.path.encode("latin-1").decode("utf-8", "replace"),
                old_blob=index.group(1),
                new_blob=index.group(2),
                mode=index.group(3),
                hunks=tuple(hunks),
            )
        )
    if refused:
        return tuple(files)
    rendered = b"".join(render_file(file) for file in files)
    if rendered.rstrip(b"\n") != diff.rstrip(b"\n"):
        wrong = first_line
        for ours, theirs in zip(rendered.split(b"\n"), diff.split(b"\n"), strict=False):
            if ours != theirs:
                break
            wrong += 1
        draft.find("diff", "this line of the diff is not understood, or does not belong in it", wrong)
    for file in files:
        _check_hunks(draft, file)
    paths = [file.path for file in files]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        draft.find("diff", f"{path}: appears in the diff more than once")
    return tuple(files)


def _hunk(parsed: unidiff.patch.Hunk, number: int) -> Hunk:
    body: list[tuple[Op, bytes]] = []
    for line in parsed:
        if line.line_type == "\\":
            op, value = body[-1]
            body[-1] = (op, value.removesuffix(b"\n"))
        elif line.line_type in (" ", "+", "-"):
            body.append((cast("Op", line.line_type), line.value.encode("latin-1")))
    return Hunk(
        number=number,
        old_start=parsed.source_start,
        new_start=parsed.target_start,
        heading=parsed.section_header.encode("latin-1"),
        body=tuple(body),
    )


def render_file(file: FilePatch) -> bytes:
    """The diff of one file, byte for byte as git writes it."""
    name = file.path.encode()
    tail = b"\t\n" if b" " in name else b"\n"
    out = [b"diff --git a/%s b/%s\n" % (name, name)]
    out.append(f"index {file.old_blob}..{file.new_blob} {file.mode}\n".encode())
    out.append(b"--- a/%s%s+++ b/%s%s" % (name, tail, name, tail))
    out.extend(render_hunk(hunk) for hunk in file.hunks)
    return b"".join(out)


def render_hunk(hunk: Hunk) -> bytes:
    """One hunk as git writes it."""

    def span(start: int, length: int) -> str:
        return str(start) if length == 1 else f"{start},{length}"

    old, new = span(hunk.old_start, len(hunk.pre_image)), span(hunk.new_start, len(hunk.post_image))
    out = [f"@@ -{old} +{new} @@".encode() + (b" " + hunk.heading if hunk.heading else b"") + b"\n"]
    for op, line in hunk.body:
        out.append(op.encode() + line)
        if not line.endswith(b"\n"):
            out.append(b"\n\\ No newline at end of file\n")
    return b"".join(out)


def _check_hunks(draft: _Draft, file: FilePatch) -> None:
    if not file.hunks:
        draft.find("diff", f"{file.path}: has no hunk")
    for hunk in file.hunks:
        where = f"{file.path}, hunk {hunk.number}"
        if not hunk.added:
            draft.find("call-site", f"{where}: adds no line; a patch adds call sites")
        if hunk.leading < 1 or hunk.trailing < 1:
            draft.find("context", f"{where}: needs at least one context line before and after the change")


def _read_hooks(draft: _Draft, files: tuple[FilePatch, ...]) -> tuple[Hook, ...]:
    added: dict[str, list[str]] = {
        file.path: [line.decode("utf-8", "replace").strip() for hunk in file.hunks for line in hunk.added]
        for file in files
    }
    hooks: list[Hook] = []
    for number, text in draft.trailers.get("Kvpatch-Hook", []):
        path, colon, line = text.partition(": ")
        hook = Hook(path=path, line=line.strip())
        if not colon or not hook.line:
            draft.find("hook", "Kvpatch-Hook is written `path: added line`", number)
        elif path not in added:
            draft.find("hook", f"Kvpatch-Hook names {path}, which this patch does not change", number)
        elif added[path].count(hook.line) != 1:
            count = added[path].count(hook.line)
            draft.find(
                "hook", f"Kvpatch-Hook line is added {count} times in {path}, not once: {hook.line}", number
            )
        else:
            hooks.append(hook)
    if not draft.trailers.get("Kvpatch-Hook"):
        draft.find("hook", "has no Kvpatch-Hook")
        return ()
    named = {(hook.path, hook.line) for hook in hooks}
    for file in files:
        for hunk in file.hunks:
            lines = {line.decode("utf-8", "replace").strip() for line in hunk.added}
            if lines and not any((file.path, line) in named for line in lines):
                draft.find(
                    "hook", f"{file.path}, hunk {hunk.number}: no Kvpatch-Hook names a line that it adds"
                )
    return tuple(hooks)
