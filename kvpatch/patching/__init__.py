"""The patch engine: series of call-site patches, applied only where their place is beyond doubt."""

from __future__ import annotations

from kvpatch.patching.apply import apply_series, try_series
from kvpatch.patching.errors import DirtyTreeError, Finding, PatchFailure, PatchFormatError
from kvpatch.patching.model import FilePatch, Hook, Hunk, Patch
from kvpatch.patching.report import ApplyReport, HunkReport, PatchReport, Status, Verdict
from kvpatch.patching.series import Series, check_matches, load_series

__all__ = [
    "ApplyReport",
    "DirtyTreeError",
    "FilePatch",
    "Finding",
    "Hook",
    "Hunk",
    "HunkReport",
    "Patch",
    "PatchFailure",
    "PatchFormatError",
    "PatchReport",
    "Series",
    "Status",
    "Verdict",
    "apply_series",
    "check_matches",
    "load_series",
    "try_series",
]
