"""Stage apply: Ollama's own llama.cpp patches as Ollama would apply them, then our series on both trees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kvpatch import process
from kvpatch.errors import PatchError
from kvpatch.patching import Patch, apply_series
from kvpatch.sources import Store, Tree
from kvpatch.stages import worktree
from kvpatch.stages.context import Context, Value


def run(context: Context) -> Value:
    """Patch each tree. Raises PatchError, whose data holds the verdict on every hunk of every patch."""
    plan = context.plan
    store = Store(plan.cache / "sources")
    value: Value = {}
    for upstream, tree in context.trees().items():
        fetched = context.values["fetch"][upstream]
        base = fetched["base_commit"]
        if upstream == "llama.cpp" and plan.ollama is not None:
            context.detail("apply", "llama.cpp: Ollama's compat patches")
            base = _compat(context, tree)
        patches: tuple[Patch, ...] = (
            plan.llama_cpp_patches if upstream == "llama.cpp" else plan.ollama_patches
        )
        context.detail("apply", f"{upstream}: {len(patches)} patches")
        handle = Tree(
            path=tree,
            base_commit=base,
            upstream_commit=fetched["upstream_commit"],
            missing=tuple(fetched["missing"]),
            key=base,
        )
        report = apply_series(tree, base, patches, fetch_base=partial(store.fetch_commit, handle))
        value[upstream] = {"base_commit": base, "commit": report.commit, "report": report.to_json()}
    return value


def _compat(context: Context, tree: Path) -> str:
    # With a prepared source Ollama's build links llama/compat but does not apply its patches (it leaves that to the
    # developer), and several architectures of published models would not load. So run upstream's own script.
    compat = context.ollama_tree / "llama" / "compat"
    script = compat / "apply-patch.cmake"
    if script.is_file():
        try:
            process.run(
                [
                    context.plan.tool("cmake").path,
                    f"-DPATCH_DIR={compat}",
                    f"-DPATCH_FILE={compat / 'llama-cpp-hooks.patch'}",  # v0.30.0 had one patch and named it
                    "-P",
                    script,
                ],
                cwd=tree,
                log=context.log("apply"),
            )
        except process.ProcessFailure as failure:
            raise PatchError(
                f"Ollama's compat patches do not apply to llama.cpp {context.plan.llama_cpp.ref}:\n{failure.tail}",
                hint="use the llama.cpp that the release pins, or one listed as verified with it: `kvpatch versions`",
            ) from failure
    return worktree.commit_all(tree, "Ollama's compat patches")
