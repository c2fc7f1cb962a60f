"""Pages: what an elastic build reserves and what it maps at so many tokens.

Every tensor of a cache begins on a page (the buffer's alignment is the page), cells [0, n) of a stream are one range,
and n is rounded up to 256 as llama_kv_cache::get_n_kv rounds what it reads. A recurrent state is mapped in full; so is
a stream of V without flash attention once it holds a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpatch.estimate.cache import CUDA, RECURRENT, Cache, Caches, CacheTensor, Device
from kvpatch.estimate.errors import EstimateError
from kvpatch.estimate.sizes import is_quantised, pad, row_bytes

READ_STEP = 256
PAGES = {"cuda": 2 << 20, "cpu": 4 << 10}  # what each device's memory is mapped by, unless asked otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class MappedCache:
    """One cache in pages, bytes. `step_bytes`: one more page of every tensor; `step_tokens`: tokens until a cache needs
    one, of the tensor with the widest rows (0: it does not grow)."""

    kind: str
    reserved: int
    mapped: int
    ahead: int
    step_bytes: int
    step_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """All caches at `tokens` tokens of one sequence. `ahead`: what preparing the next page adds at most."""

    tokens: int
    page: int
    caches: tuple[MappedCache, ...]

    @property
    def reserved(self) -> int:
        return sum(c.reserved for c in self.caches)

    @property
    def mapped(self) -> int:
        return sum(c.mapped for c in self.caches)

    @property
    def ahead(self) -> int:
        return sum(c.ahead for c in self.caches)


def map_tokens(caches: Caches, device: Device, *, page: int, tokens: int) -> Mapped:
    """The pages under `tokens` tokens of one sequence, in a context used by no other."""
    if page < 4096 or page & (page - 1):
        raise EstimateError(f"a page of {page} bytes: it must be a power of two, 4096 at least")
    if tokens < 0 or tokens > caches.context_slot:
        raise EstimateError(f"{tokens} tokens do not fit a sequence's {caches.context_slot} cells")
    return Mapped(
        tokens=tokens,
        page=page,
        caches=tuple(_mapped(cache, device, page, tokens) for cache in caches.caches),
    )


def _mapped(cache: Cache, device: Device, page: int, tokens: int) -> MappedCache:
    # a ring takes in every token until it is full, then writes over the oldest
    cells = min(pad(tokens, READ_STEP), cache.cells)
    mapped = ahead = 0
    for tensor in cache.tensors:
        now = _tensor(tensor, device, page, cache.cells if cache.kind == RECURRENT else cells)
        mapped += now
        if tokens and not tensor.spread and cache.kind != RECURRENT and cells < cache.cells:
            # asked for where the next 256 cells are not all there yet
            ahead += _tensor(tensor, device, page, min(cells + READ_STEP, cache.cells)) - now
    growing = [t for t in cache.tensors if not t.spread and t.row_bytes] if cache.kind != RECURRENT else []
    return MappedCache(
        kind=cache.kind,
        reserved=sum(pad(t.alloc_bytes(device), page) for t in cache.tensors),
        mapped=mapped,
        ahead=ahead,
        step_bytes=len(growing) * page,
        step_tokens=min((page // t.row_bytes for t in growing), default=0),
    )


def _tensor(tensor: CacheTensor, device: Device, page: int, cells: int) -> int:
    """Bytes of whole pages under cells [0, cells) of the first stream."""
    if not cells or not tensor.row_bytes:
        return 0
    end = (tensor.cells if tensor.spread else cells) * tensor.row_bytes
    if device is CUDA and is_quantised(tensor.kind):
        end += row_bytes(tensor.kind, device.row_padding)  # kernels read a tile beyond the last row
    return min(pad(end, page), pad(tensor.alloc_bytes(device), page))
