"""Fifty seeded mutations of a C file full of lookalikes: a patch lands in its own function or not at all."""

from __future__ import annotations

import random
import re

import pytest
from patched_upstream import Upstream, c_file, git, insert_after

from kvpatch.patching import PatchFailure, apply_series

FILE = "src/store.c"
FUNCTIONS = ("alpha", "beta", "gamma", "delta")
HOOK = "hook_gamma();"
COMMON = "    ok = store_put(s, n);"


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random changes of the kind upstreams make: lines duplicated, moved, deleted, edited, functions
    renamed.
    """
    lines = data.decode().split("\n")[:-1]
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["duplicate", "move", "delete", "edit", "rename", "block", "blank"])
        # Half of the changes are made around the function that the patch is for.
        low, high = rng.choice([(0, len(lines)), (30, 50)])
        i, j = (min(rng.randrange(low, high), len(lines) - 1) for _ in range(2))
        if kind == "duplicate":
            lines.insert(j, lines[i])
        elif kind == "move":
            lines.insert(j, lines.pop(i))
        elif kind == "delete":
            del lines[i]
        elif kind == "edit":
            lines[i] = lines[i].replace("n", "m", 1)
        elif kind == "rename":
            name = rng.choice(FUNCTIONS)
            lines = [re.sub(rf"\bint {name}\(", f"int {name}_v2(", line) for line in lines]
        elif kind == "block":
            lines[j:j] = lines[i : i + rng.randint(2, 6)]
        else:
            lines.insert(j, "")
        if not lines:
            lines = [""]
    return ("\n".join(lines) + "\n").encode()


def function_of_hook(data: bytes) -> str:
    """The function that the hook is in, by a plain reading; empty when its header was deleted."""
    owner = ""
    for line in data.decode().split("\n"):
        found = re.match(r"int (\w+?)(?:_v2)?\(", line)
        if found:
            owner = found.group(1)
        elif line == "}":
            owner = ""
        if line.strip() == HOOK:
            return owner
    raise AssertionError("no hook")


@pytest.mark.parametrize("context", [1, 3])
def test_never_in_the_wrong_function(c_upstream: Upstream, context: int) -> None:
    edit = insert_after("    gamma_lock(s);", f"    {HOOK}")
    c_upstream.make_patch("0001-gamma", {FILE: edit}, [(FILE, HOOK)], context=context)
    patches = c_upstream.patches()
    start = c_upstream.head()
    applied = refused = 0
    for seed in range(25):
        rng = random.Random(1000 * context + seed)
        mutated = mutate(c_file(FUNCTIONS), rng)
        git(c_upstream.tree, "checkout", "-q", "-B", "main", start)
        base = c_upstream.commit({FILE: mutated})
        try:
            apply_series(c_upstream.tree, base, patches)
        except PatchFailure:
            refused += 1
            assert c_upstream.read(FILE) == mutated, f"seed {seed}: refused, but the file was changed"
            continue
        applied += 1
        result = c_upstream.read(FILE)
        assert function_of_hook(result) in ("gamma", ""), f"seed {seed}"
        assert result.replace(f"    {HOOK}\n".encode(), b"") == mutated, (
            f"seed {seed}: more than the hook changed"
        )
        lines = result.decode().split("\n")
        assert lines[lines.index(f"    {HOOK}") - 1] == "    gamma_lock(s);", f"seed {seed}"
        assert lines[lines.index(f"    {HOOK}") + 1] == COMMON, f"seed {seed}"
    assert applied >= 5, "too few mutations left the patch applicable for this test to say anything"
    assert refused >= 3, "too few mutations broke the patch for this test to say anything"
