"""Stage fetch: upstream's trees, as upstream has them, in the workspace."""

from __future__ import annotations

from kvpatch.errors import SourceError
from kvpatch.sources import Resolved, Store
from kvpatch.stages import mtimes, worktree
from kvpatch.stages.context import Context, Value

# Files without which nothing can be built; a mirror may lack any other.
_WANTED = {
    "llama.cpp": ("CMakeLists.txt", "src/CMakeLists.txt", "tools/server/CMakeLists.txt"),
    "ollama": ("go.mod", "CMakeLists.txt", "LLAMA_CPP_VERSION"),
}
_UNUSED_SUFFIXES = (".txt", ".model", ".png", ".jpg", ".gif", ".bin", ".gguf", ".json")


def run(context: Context) -> Value:
    """Bring every source into its tree. Raises SourceError; a tree that somebody edited is refused, not overwritten."""
    store = Store(context.plan.cache / "sources")
    value: Value = {}
    for path in context.trees().values():
        worktree.refuse_edits(path)
    for upstream, path in context.trees().items():
        source = context.plan.llama_cpp if upstream == "llama.cpp" else context.plan.ollama
        assert source is not None
        mtimes.record(path)
        worktree.mark_unfinished(path)
        tree = store.materialize(source, path, progress=lambda text: context.detail("fetch", text))
        _refuse_missing(upstream, source, tree.missing)
        if upstream == "ollama":
            _check_profile(context)
        value[upstream] = {
            "base_commit": tree.base_commit,
            "upstream_commit": tree.upstream_commit,
            "missing": list(tree.missing),
        }
    return value


def _refuse_missing(upstream: str, source: Resolved, missing: tuple[str, ...]) -> None:
    needed = [
        p
        for p in missing
        if p in _WANTED[upstream] or not ("testdata/" in p and p.endswith(_UNUSED_SUFFIXES))
    ]
    if needed:
        raise SourceError(
            f"{source.location} lacks {len(needed)} files of {upstream} {source.ref} that a build may need: "
            + ", ".join(needed[:5]),
            hint="complete the mirror (git fsck --connectivity-only names what is missing), or give another source",
        )


def _check_profile(context: Context) -> None:
    tree = context.ollama_tree
    if (tree / "llm" / "llama_server.go").is_file() and (tree / "LLAMA_CPP_VERSION").is_file():
        pinned = (tree / "LLAMA_CPP_VERSION").read_text(encoding="utf-8").strip()
        assert context.plan.release is not None
        if pinned != context.plan.release.llama_cpp:
            raise SourceError(
                f"LLAMA_CPP_VERSION in the tree says {pinned}, patches/pins.toml says {context.plan.release.llama_cpp}",
                hint="the source is another release, its tag was moved, or pins.toml is wrong; compare with upstream",
            )
        return
    raise SourceError(
        f"what was given as {context.plan.name} is not Ollama's source of the llama-server profile "
        "(no llm/llama_server.go), the one this kvpatch has a series for",
        hint="releases from v0.30.0 on have it: `kvpatch versions`; compare --ollama-source",
    )
