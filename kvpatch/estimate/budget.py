"""How many such models a budget holds: each with its weights, its cache and a process's own memory."""

from __future__ import annotations

from dataclasses import dataclass

from kvpatch.estimate.cache import CUDA, Caches, Device
from kvpatch.estimate.errors import EstimateError
from kvpatch.estimate.mapped import Mapped
from kvpatch.estimate.sizes import MIB, pad
from kvpatch.estimate.weights import Weights

CUDA_CONTEXT = 527 * MIB  # an empty CUDA context, as measured on an H200


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one model takes, bytes."""

    weights: int
    cache: int
    context: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.context + self.compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How many models fit `budget` bytes: of a stock build, of an elastic one all awake with `tokens` tokens each, and
    how many more can sleep beside one that is awake (None: any number, where a
    sleeper takes nothing)."""

    budget: int
    tokens: int
    stock: Share
    awake: Share
    asleep: Share
    stock_models: int
    awake_models: int
    asleep_models: int | None


def fit(
    weights: Weights,
    caches: Caches,
    mapped: Mapped,
    device: Device,
    *,
    budget: int,
    context: int | None = None,
    compute: int = 0,
) -> Budget:
    """Count them. `context`: bytes of a process's device context (None: 527 MiB on CUDA, else 0); `compute`: bytes of a
    model's compute buffers, which depend on the graph and are not estimated. Weights of an elastic build end on a page.
    """
    own = (CUDA_CONTEXT if device is CUDA else 0) if context is None else context
    if budget < 0 or own < 0 or compute < 0:
        raise EstimateError("a budget and what a process takes cannot be negative")
    stock = Share(weights=weights.device.nbytes, cache=caches.nbytes(device), context=own, compute=compute)
    awake = Share(
        weights=pad(weights.device.nbytes, mapped.page),
        cache=mapped.mapped + mapped.ahead,
        context=own,
        compute=pad(compute, mapped.page),
    )
    asleep = Share(weights=0, cache=0, context=own, compute=0)
    left = budget - awake.total
    return Budget(
        budget=budget,
        tokens=mapped.tokens,
        stock=stock,
        awake=awake,
        asleep=asleep,
        stock_models=budget // stock.total if stock.total else 0,
        awake_models=budget // awake.total if awake.total else 0,
        asleep_models=0 if left < 0 else left // own if own else None,
    )
