"""What every stage is given, and the names of the places in a workspace."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpatch.events import Events
from kvpatch.plan import Plan

Value = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The plan, the listener, and the JSON values that the stages before this one returned."""

    plan: Plan
    events: Events
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def llama_cpp_tree(self) -> Path:
        return self.plan.workspace / "llama.cpp"

    @property
    def ollama_tree(self) -> Path:
        return self.plan.workspace / "ollama"

    @property
    def build_dir(self) -> Path:
        return self.plan.workspace / "build"

    @property
    def library_dir(self) -> Path:
        return self.plan.workspace / "vmm"

    @property
    def service_dir(self) -> Path:
        return self.plan.workspace / "kvcachedd"

    @property
    def staging_dir(self) -> Path:
        return self.plan.workspace / "staging"

    def trees(self) -> dict[str, Path]:
        """Upstream name to work tree, for the upstreams that this plan has."""
        trees = {"llama.cpp": self.llama_cpp_tree}
        if self.plan.ollama is not None:
            trees["ollama"] = self.ollama_tree
        return trees

    def log(self, stage: str) -> Path:
        """The log file of a stage."""
        return self.plan.workspace / "logs" / f"{stage}.log"

    def detail(self, stage: str, text: str) -> None:
        """Say what a stage is at, to the listener and in its log."""
        self.write_log(stage, text)
        self.events.stage_detail(stage, text)

    def write_log(self, stage: str, text: str) -> None:
        """Add lines to the log of a stage. Raises OSError."""
        path = self.log(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="replace") as log:
            log.write(text.rstrip("\n") + "\n")
