"""The models of a run: six that generate, each of another size, and one that embeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpatch.smoke import models
from kvpatch.smoke.models import CONTEXT_TRAINED, Shape, TinyModel

# Weights of 50 to 75 MB beside KV caches of 50 to 80 MB: neither may be neglected against the other.
CONTEXT = CONTEXT_TRAINED
EMBED_CONTEXT = 2048
BATCH = 128  # keeps compute buffers, whose mask is context * batch, below weights and caches


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A model by the name it has in Ollama. `contexts`: num_ctx of its requests, the largest first."""

    name: str
    model: TinyModel
    contexts: tuple[int, ...]
    embeds: bool = False


def _llama(layers: int, embd: int, ff: int, kv_heads: int) -> Shape:
    return Shape(
        arch="llama", layers=layers, embd=embd, heads=embd // 64, kv_heads=kv_heads, head_dim=64, ff=ff
    )


_SHAPES = {
    "e2e-a": _llama(4, 512, 2048, 2),
    "e2e-b": _llama(4, 512, 1920, 2),
    "e2e-c": _llama(4, 512, 1792, 2),
    "e2e-d": _llama(5, 384, 2048, 2),
    "e2e-e": _llama(4, 512, 1664, 2),
    # Every other layer is a sliding window: its cache is short, and reserved in full from the start.
    "e2e-f": Shape(arch="gemma2", layers=6, embd=512, heads=8, kv_heads=2, head_dim=64, ff=1536, window=512),
}
_EMBEDDER = Shape(arch="llama", layers=3, embd=384, heads=6, kv_heads=2, head_dim=64, ff=1152, pooling=True)


def zoo(folder: Path, seed: int) -> tuple[Member, ...]:
    """Writes the files into `folder`."""
    contexts = (CONTEXT, CONTEXT // 2, CONTEXT // 8)
    made = [
        Member(
            name=name, model=models.write(folder / f"{name}.gguf", seed + number, shape), contexts=contexts
        )
        for number, (name, shape) in enumerate(_SHAPES.items())
    ]
    embedder = models.write(folder / "e2e-embed.gguf", seed, _EMBEDDER)
    return (*made, Member(name="e2e-embed", model=embedder, contexts=(EMBED_CONTEXT,), embeds=True))
