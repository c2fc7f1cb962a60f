"""The kinds of server that a soak runs, and their models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvpatch.smoke import models
from tests.soak.sides import Device, Profile

# Head size 64: upstream's quantised caches and CUDA's flash attention want multiples of it.
_WIDE = dataclasses.replace(models.LLAMA, heads=2, kv_heads=1, head_dim=64)
_LARGE = models.Shape(arch="llama", layers=8, embd=1024, heads=16, kv_heads=4, head_dim=64, ff=2816)


def profiles(device: Device, folder: Path, model: Path | None) -> tuple[Profile, ...]:
    """`model`: used in all of them, in place of those written to `folder`."""
    if device == "cpu":
        plain = model or models.tiny_llama(folder / "llama.gguf", 1).path
        sliding = model or models.tiny_swa(folder / "sliding.gguf", 1).path
        wide = model or models.write(folder / "wide.gguf", 1, _WIDE).path
        longest = 1500
    else:
        plain = wide = model or models.write(folder / "large.gguf", 1, _LARGE).path
        sliding = model or models.tiny_swa(folder / "sliding.gguf", 1).path
        longest = 6000
    cells = -(-(longest + 256) // 256) * 256
    return (
        Profile(
            name="unified",
            model=plain,
            slots=4,
            cells=cells,
            unified=True,
            flash=True,
            kind="f16",
            longest=longest,
            answer=48,
            room=1.4,
        ),
        # Without flash attention the CPU reads masked cells too: a page too few does not go unnoticed.
        Profile(
            name="split-sliding-window",
            model=sliding,
            slots=3,
            cells=cells,
            unified=False,
            flash=False,
            kind="f16",
            longest=longest,
            answer=48,
            room=2.2,
        ),
        Profile(
            name="split-q8_0",
            model=wide,
            slots=3,
            cells=cells,
            unified=False,
            flash=True,
            kind="q8_0",
            longest=longest,
            answer=48,
            room=1.4,
        ),
        # Answers longer than the context: each of them shifts it.
        Profile(
            name="split-shift",
            model=plain,
            slots=3,
            cells=512,
            unified=False,
            flash=True,
            kind="f16",
            longest=400,
            answer=400,
            room=2.4,
            words=("--context-shift",),
        ),
    )
