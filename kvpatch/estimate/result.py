"""The whole estimate of one model, and its form for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpatch.estimate.budget import Budget, fit
from kvpatch.estimate.cache import DEVICES, Caches, Device, Settings, plan_caches
from kvpatch.estimate.errors import EstimateError
from kvpatch.estimate.layers import Model, derive
from kvpatch.estimate.mapped import PAGES, Mapped, map_tokens
from kvpatch.estimate.reader import GgufModel, read
from kvpatch.estimate.weights import Weights, plan_weights

DEFAULT_TOKENS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Everything that is known of one model with one choice of settings."""

    gguf: GgufModel
    model: Model
    device: Device
    weights: Weights
    caches: Caches
    mapped: Mapped
    budget: Budget | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, all sizes in bytes."""
        caches = [
            {
                "kind": cache.kind,
                "layers": cache.layers,
                "cells": cache.cells,
                "streams": cache.streams,
                "tensors": len(cache.tensors),
                "bytes": cache.nbytes(self.device),
                "cell_bytes": cache.cell_bytes,
                **{k: v for k, v in asdict(pages).items() if k != "kind"},
            }
            for cache, pages in zip(self.caches.caches, self.mapped.caches, strict=True)
        ]
        budget = asdict(self.budget) if self.budget else None
        if self.budget and budget:
            for name in ("stock", "awake", "asleep"):
                budget[name]["total"] = getattr(self.budget, name).total
        return {
            "files": [str(path) for path in self.gguf.paths],
            "architecture": self.model.arch,
            "layers": self.model.n_layer,
            "layers_for_drafting": self.model.nextn,
            "context_trained": self.model.context_trained,
            "device": self.device.name,
            "settings": asdict(self.caches.settings),
            "context": self.caches.context,
            "context_slot": self.caches.context_slot,
            "ubatch": self.caches.ubatch,
            "weights": asdict(self.weights),
            "cache_bytes": self.caches.nbytes(self.device),
            "token_bytes": self.caches.token_bytes,
            "caches": caches,
            "page": self.mapped.page,
            "tokens": self.mapped.tokens,
            "reserved": self.mapped.reserved,
            "mapped": self.mapped.mapped,
            "ahead": self.mapped.ahead,
            "budget": budget,
            "warnings": list(self.caches.warnings),
        }


def estimate(
    path: Path | str,
    settings: Settings | None = None,
    *,
    device: str = "cuda",
    page: int | None = None,
    tokens: int | None = None,
    budget: int | None = None,
    context: int | None = None,
    compute: int = 0,
) -> Estimate:
    """Read `path` and lay out all of it with every layer on `device` ("cuda" or "cpu"); sizes in bytes.

    `tokens` in one sequence (None: 1000, or all it can have); `page` None: 2 MiB on CUDA, 4 KiB on the CPU; the rest as
    in `fit`.
    """
    if device not in DEVICES:
        raise EstimateError(f"{device!r} is no device", hint=f"one of {', '.join(DEVICES)}")
    gguf = read(path)
    model = derive(gguf)
    on = DEVICES[device]
    weights = plan_weights(gguf, model, on)
    caches = plan_caches(model, settings or Settings())
    held = min(DEFAULT_TOKENS, caches.context_slot) if tokens is None else tokens
    mapped = map_tokens(caches, on, page=PAGES[device] if page is None else page, tokens=held)
    counted = None
    if budget is not None:
        counted = fit(weights, caches, mapped, on, budget=budget, context=context, compute=compute)
    return Estimate(
        gguf=gguf, model=model, device=on, weights=weights, caches=caches, mapped=mapped, budget=counted
    )
