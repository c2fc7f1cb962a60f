"""Stage generate: the new files of both trees."""

from __future__ import annotations

import hashlib
from typing import Any

from kvpatch import __version__, generate
from kvpatch.stages import mtimes, worktree
from kvpatch.stages.context import Context, Value


def template_context(context: Context) -> dict[str, Any]:
    """The values that templates may use."""
    plan = context.plan
    return {
        "version": __version__,
        "series": plan.series_id,
        "llama_cpp": {"commit": plan.llama_cpp.commit, "ref": plan.llama_cpp.ref},
        "ollama": {
            "commit": plan.ollama.commit if plan.ollama else "",
            "version": plan.release.semver if plan.release else "",
        },
    }


def run(context: Context) -> Value:
    """Render and write what templates/*/manifest.toml list. Raises GenerateError."""
    value: Value = {}
    for upstream, tree in context.trees().items():
        if not context.plan.stock:
            files = generate.render(context.plan.data, upstream, template_context(context))
            changed = generate.write(files, tree)
            context.detail("generate", f"{upstream}: {len(changed)} of {len(files)} files written")
            value[upstream] = {file.dest: hashlib.sha256(file.content).hexdigest() for file in files}
        mtimes.restore(tree)
        worktree.mark_finished(tree)
    return value
