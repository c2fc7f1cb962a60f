"""Stage generate: the new files of both trees."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from kvpatch import __version__, generate
from kvpatch.stages import mtimes, worktree
from kvpatch.stages.context import Context, Value

_UNKNOWN = "commit not known"


def template_context(context: Context) -> dict[str, Any]:
    """The values that templates may use."""
    plan = context.plan
    return {
        "version": __version__,
        "series": plan.series_id,
        "llama_cpp": {
            "commit": plan.llama_cpp.commit or _UNKNOWN,
            "pin": plan.release.llama_cpp if plan.release else plan.llama_cpp.ref,
        },
        "ollama": {
            "commit": (plan.ollama.commit or _UNKNOWN) if plan.ollama else "",
            "version": plan.release.semver if plan.release else "",
        },
    }


def run(context: Context) -> Value:
    """Render and write what templates/*/manifest.toml list. Raises GenerateError."""
    value: Value = {}
    for upstream, tree in context.trees().items():
        files: tuple[generate.Generated, ...] = ()
        if not context.plan.stock:
            files = generate.render(context.plan.data, upstream, template_context(context))
            changed = generate.write(files, tree)
            context.detail("generate", f"{upstream}: {len(changed)} of {len(files)} files written")
            value[upstream] = {file.dest: hashlib.sha256(file.content).hexdigest() for file in files}
        mtimes.restore(tree)
        _announce(tree, {file.dest: hashlib.sha256(file.content).hexdigest() for file in files})
        worktree.mark_finished(tree)
    return value


def _announce(tree: Path, sums: dict[str, str]) -> None:
    """Make CMake look again for source files when the set of generated ones changed.

    Upstream collects some sources with file(GLOB) and without CONFIGURE_DEPENDS, so a nested build that was configured
    before would neither compile a new file nor miss a removed one. A newer CMakeLists.txt makes ninja configure again.
    """
    for name in worktree.generated(tree).keys() ^ sums.keys():
        for folder in (tree / name).parents:
            listing = folder / "CMakeLists.txt"
            if listing.is_file():
                os.utime(listing)
                break
            if folder == tree:
                break
    worktree.record_generated(tree, sums)
