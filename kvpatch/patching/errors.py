"""What can go wrong with patch files, with the tree they are applied to, and with applying them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpatch.errors import PatchError

if TYPE_CHECKING:
    from kvpatch.patching.report import ApplyReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong with a series or one of its patch files."""

    file: str
    line: int | None = None
    code: str
    text: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.text} [{self.code}]"

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.line, "code": self.code, "text": self.text}


class PatchFormatError(PatchError):
    """Patch files or their series are malformed; every finding is listed, not just the first (exit 5)."""

    code = "patch-format"

    def __init__(self, what: str, findings: Sequence[Finding]) -> None:
        count = f"{len(findings)} finding" + ("" if len(findings) == 1 else "s")
        super().__init__(
            f"{what}: {count}\n" + "\n".join(f"  {finding}" for finding in findings),
            hint="Correct the files named above; docs/patch-format.md describes the format.",
            data={"findings": [finding.to_json() for finding in findings]},
        )
        self.findings = tuple(findings)


class DirtyTreeError(PatchError):
    """The tree holds somebody's own edits or commits, which applying would overwrite (exit 5)."""

    code = "dirty-tree"


class PatchFailure(PatchError):
    """At least one patch does not apply; `report` (and `data`, its JSON) covers all of them (exit 5)."""

    code = "patch-failed"

    def __init__(self, message: str, report: ApplyReport, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint, data=report.to_json())
        self.report = report
