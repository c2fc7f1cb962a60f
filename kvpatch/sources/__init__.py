"""Upstream source: found by URL, repository, folder, archive or source distribution, checked, laid out as a
work tree.
"""

from __future__ import annotations

from kvpatch.sources.model import LLAMA_CPP, OLLAMA, Kind, Pin, Progress, Resolved, Tree, Upstream
from kvpatch.sources.store import Store

__all__ = ["LLAMA_CPP", "OLLAMA", "Kind", "Pin", "Progress", "Resolved", "Store", "Tree", "Upstream"]
