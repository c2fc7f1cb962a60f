"""Measurements, always as a ratio against stock in one run: `build` of what patching costs a build from nothing, the
others of what llama-server does with the patches."""

from __future__ import annotations

from kvpatch.bench.build import ColdBuild, cold_build

__all__ = ["ColdBuild", "cold_build"]
