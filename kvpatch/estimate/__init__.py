"""What a model will take, to the byte, from its GGUF file alone: weights, caches, page steps, how many fit.

`reader` opens the file, `archs` says of each architecture what its metadata means, `layers` derives the layers,
`weights` and `cache` lay their tensors out as llama.cpp's allocator does, `mapped` adds the pages of an elastic build,
`budget` counts models. `estimate()` puts them together. Nothing is loaded and no library of llama.cpp is needed.

Formulas are those of llama.cpp at the pinned commit; each module names the functions it follows.
"""

from kvpatch.estimate.budget import Budget, fit
from kvpatch.estimate.cache import Caches, Settings, plan_caches
from kvpatch.estimate.errors import EstimateError, UnknownArchitectureError
from kvpatch.estimate.layers import Model, derive
from kvpatch.estimate.mapped import Mapped, map_tokens
from kvpatch.estimate.reader import GgufModel, read
from kvpatch.estimate.result import Estimate, estimate
from kvpatch.estimate.sizes import format_bytes, parse_bytes
from kvpatch.estimate.weights import Weights, plan_weights

__all__ = [
    "Budget",
    "Caches",
    "Estimate",
    "EstimateError",
    "GgufModel",
    "Mapped",
    "Model",
    "Settings",
    "UnknownArchitectureError",
    "Weights",
    "derive",
    "estimate",
    "fit",
    "format_bytes",
    "map_tokens",
    "parse_bytes",
    "plan_caches",
    "plan_weights",
    "read",
]
