"""What can be wrong with a model file or with what is asked of it."""

from __future__ import annotations

from kvpatch.errors import UsageError


class EstimateError(UsageError):
    """The file is no model that llama.cpp would load, or not with these settings (exit 2)."""

    code = "estimate"


class UnknownArchitectureError(EstimateError):
    """How this architecture's caches are laid out is not known exactly, so nothing is said about it."""

    code = "estimate-architecture"

    def __init__(self, arch: str, why: str) -> None:
        super().__init__(
            f"the memory of architecture {arch!r} cannot be derived exactly: {why}",
            hint="load it with llama-server: its log says how large each buffer is",
            data={"architecture": arch},
        )
