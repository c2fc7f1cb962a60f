"""One module a stage of the build; pipeline.py puts them in order."""

from __future__ import annotations
