"""The caches of a context: every tensor, its bytes and its padding.

Follows llama_context's constructor (sizes of context and batch), llama_model::create_memory (which caches),
llama_kv_cache, llama_kv_cache_iswa, _dsa, _msa, llama_memory_recurrent and llama_memory_hybrid (their tensors), and
ggml_backend_alloc_ctx_tensors_from_buft (alignment, sum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType

from kvpatch.estimate import archs
from kvpatch.estimate.errors import EstimateError
from kvpatch.estimate.layers import Layer, Model, with_indexer
from kvpatch.estimate.sizes import block_size, is_quantised, kv_type, pad, row_bytes

CONTEXT_STEP = 256  # cells to which a context is rounded up
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
F32 = GGMLQuantizationType.F32


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A buffer type. `alignment` in bytes; `row_padding`: elements to whose multiple the end of a quantised tensor is
    padded (ggml-cuda's MATRIX_ROW_PADDING), 0: none."""

    name: str
    alignment: int
    row_padding: int

    def alloc_bytes(self, kind: GGMLQuantizationType, row: int, nbytes: int) -> int:
        """get_alloc_size: `nbytes`, and the padding of its last row of `row` elements."""
        if self.row_padding and is_quantised(kind) and row % self.row_padding:
            return nbytes + row_bytes(kind, self.row_padding - row % self.row_padding)
        return nbytes


CPU = Device(name="cpu", alignment=32, row_padding=0)
CUDA = Device(name="cuda", alignment=128, row_padding=512)
DEVICES = {device.name: device for device in (CPU, CUDA)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the caches depend on besides the model, as llama-server takes it: `context` is -c, the cells of all slots
    together (0: the trained one); `parallel` -np; `unified` -kvu; `flash_attn` False: -fa off; `batch` -b; `ubatch`
    -ub."""

    context: int = 0
    parallel: int = 4
    unified: bool = True
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    batch: int = 2048
    ubatch: int = 512
    swa_full: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTensor:
    """One tensor of a cache: `row` elements a cell, `cells` a stream. `spread`: a cell's elements lie apart (V without
    flash attention). A recurrent state has `cells` sequences, each mapped from the start."""

    name: str
    layer: int
    kind: GGMLQuantizationType
    row: int
    cells: int
    streams: int
    spread: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one cell."""
        return row_bytes(self.kind, self.row)

    @property
    def nbytes(self) -> int:
        """Bytes without padding (ggml_nbytes)."""
        return self.row_bytes * self.cells * self.streams

    def alloc_bytes(self, device: Device) -> int:
        """Bytes in a buffer of `device` before alignment."""
        return device.alloc_bytes(self.kind, self.row, self.nbytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """The tensors of one kind of layer: "full attention", "sliding window", "latent attention (MLA)", "indexer keys" or
    "recurrent state"."""

    kind: str
    cells: int
    streams: int
    layers: int
    tensors: tuple[CacheTensor, ...]

    @property
    def recurrent(self) -> bool:
        return self.kind == RECURRENT

    def nbytes(self, device: Device) -> int:
        """Bytes that llama.cpp allocates: each tensor rounded up to the alignment."""
        return sum(pad(t.alloc_bytes(device), device.alignment) for t in self.tensors)

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell in all layers; of one sequence for a recurrent state."""
        return sum(t.row_bytes for t in self.tensors)


FULL, WINDOW, LATENT, INDEXER, RECURRENT = (
    "full attention",
    "sliding window",
    "latent attention (MLA)",
    "indexer keys",
    "recurrent state",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caches:
    """All caches of one context. `context`: cells in all after rounding; `context_slot`: what one sequence can have;
    `ubatch`: after its limits; `warnings`: where llama.cpp would warn."""

    context: int
    context_slot: int
    ubatch: int
    settings: Settings
    caches: tuple[Cache, ...]
    warnings: tuple[str, ...]

    def nbytes(self, device: Device) -> int:
        """Bytes that llama.cpp allocates on `device`."""
        return sum(cache.nbytes(device) for cache in self.caches)

    @property
    def token_bytes(self) -> int:
        """Bytes that one more token takes in the caches that grow with the context."""
        return sum(c.cell_bytes for c in self.caches if c.kind in (FULL, LATENT, INDEXER))


def plan_caches(model: Model, settings: Settings) -> Caches:
    """The caches that llama_init_from_model makes; EstimateError where it would refuse."""
    settings, notes = _checked(model, settings)
    asked = settings.context or model.context_trained
    batch = min(asked, settings.batch) if model.causal else settings.batch
    ubatch = min(batch, settings.ubatch or settings.batch)
    context = pad(asked, CONTEXT_STEP)
    slot = context
    if not settings.unified:
        slot = pad(context // settings.parallel, CONTEXT_STEP)
        if slot == 0:
            raise EstimateError(
                f"a context of {asked} cells leaves none for each of {settings.parallel} sequences"
            )
        if slot * settings.parallel != context:
            context = slot * settings.parallel
            notes.append(f"the context becomes {context} cells: {settings.parallel} sequences of {slot}")
    if slot > model.context_trained:
        notes.append(
            f"{slot} cells a sequence are more than the {model.context_trained} the model was trained on"
        )
    caches = tuple(_caches(model, settings, slot, ubatch))
    return Caches(
        context=context,
        context_slot=slot,
        ubatch=ubatch,
        settings=settings,
        caches=tuple(c for c in caches if c.tensors),
        warnings=tuple(notes),
    )


def _checked(model: Model, settings: Settings) -> tuple[Settings, list[str]]:
    """The checks and changes of llama_init_from_model."""
    notes: list[str] = []
    if settings.context < 0 or settings.batch < 1 or settings.ubatch < 0:
        raise EstimateError("the context and the batch cannot be negative")
    if settings.context == 0 and model.context_trained == 0:
        raise EstimateError("the file names no context length", hint="--num-ctx N")
    if not 1 <= settings.parallel <= MAX_SEQUENCES:
        raise EstimateError(f"{settings.parallel} sequences: llama.cpp takes 1 to {MAX_SEQUENCES}")
    k, v = kv_type(settings.type_k), kv_type(settings.type_v)
    if model.mla and k != v:
        raise EstimateError(
            "this model caches K and V together: --kv-type-v must be the same type as --kv-type"
        )
    if model.arch == "grok" and settings.flash_attn:
        settings = replace(settings, flash_attn=False)
        notes.append("flash attention is forced off for this architecture")
    if is_quantised(v) and not settings.flash_attn:
        raise EstimateError(f"a V cache of type {settings.type_v} needs flash attention")
    if settings.flash_attn:
        for layer in model.layers[: model.n_layer]:
            for name, kind, size in (("K", k, layer.head_k), ("V", v, layer.head_v)):
                if is_quantised(kind) and size % block_size(kind):
                    raise EstimateError(
                        f"{kind.name.lower()} has blocks of {block_size(kind)} elements, which do not divide a head's "
                        f"{size} elements of {name}",
                        hint="another --kv-type",
                    )
    return settings, notes


def _caches(model: Model, settings: Settings, cells: int, ubatch: int) -> Iterator[Cache]:
    """llama_model::create_memory."""
    arch = model.arch
    if arch in archs.CACHELESS:
        return
    if arch in archs.RECURRENT:
        yield _states(model, settings, lambda layer: True)
        return
    if arch in archs.DSA:
        main = _attention(
            model, settings, cells, lambda layer: model.nextn == 0 or layer.index < model.n_layer
        )
        yield main
        yield _attention(with_indexer(model), settings, cells, lambda layer: layer.indexer, kind=INDEXER)
        return
    if arch in archs.MSA:
        yield _attention(model, settings, cells, lambda layer: True)
        yield _attention(with_indexer(model), settings, cells, lambda layer: layer.indexer, kind=INDEXER)
        return
    chosen = _attention_filter(model)
    if model.window:
        yield _attention(model, settings, cells, lambda layer: chosen(layer) and not layer.sliding)
        ring = cells if settings.swa_full else ring_cells(model.window, cells, settings, ubatch)
        yield _attention(model, settings, ring, lambda layer: chosen(layer) and layer.sliding, kind=WINDOW)
    else:
        yield _attention(model, settings, cells, chosen)
    if arch in archs.HYBRID:
        yield _states(model, settings, _recurrent_filter(model))


def ring_cells(window: int, cells: int, settings: Settings, ubatch: int) -> int:
    """Cells of a stream in a sliding-window cache (llama_kv_cache_iswa): the windows of all sequences in it and one
    physical batch, rounded up to 256; never more than the full cache, so rounded."""
    return pad(min(cells, window * (settings.parallel if settings.unified else 1) + ubatch), CONTEXT_STEP)


def _attention_filter(model: Model) -> Callable[[Layer], bool]:
    arch = model.arch
    if arch == "falcon-h1":
        return lambda layer: True
    if arch in ("nemotron_h", "nemotron_h_moe"):
        return lambda layer: not layer.recurrent and layer.feed_forward == 0
    if arch in archs.RECURRENT_BY_INTERVAL:
        return lambda layer: layer.index < model.n_layer and not layer.recurrent
    if arch in archs.HYBRID:
        return lambda layer: not layer.recurrent
    if arch in archs.NEXTN_FILTERED and model.nextn:
        return lambda layer: layer.index < model.n_layer
    return lambda layer: True


def _recurrent_filter(model: Model) -> Callable[[Layer], bool]:
    arch = model.arch
    if arch == "falcon-h1":
        return lambda layer: True
    if arch in ("nemotron_h", "nemotron_h_moe"):
        return lambda layer: layer.recurrent and layer.feed_forward == 0
    return lambda layer: layer.recurrent


def _attention(
    model: Model, settings: Settings, cells: int, chosen: Callable[[Layer], bool], *, kind: str | None = None
) -> Cache:
    """llama_kv_cache: K and V of every chosen layer that has a cache of its own."""
    k, v = kv_type(settings.type_k), kv_type(settings.type_v)
    spread = not settings.flash_attn
    widest = max(layer.v_elements for layer in model.layers)
    streams = 1 if settings.unified else settings.parallel
    layers = [
        layer
        for layer in model.layers
        if chosen(layer) and (model.kv_from_start < 0 or layer.index < model.kv_from_start)
    ]
    tensors: list[CacheTensor] = []
    for layer in layers:
        tensors.append(
            CacheTensor(
                name=f"cache_k_l{layer.index}",
                kind=k,
                layer=layer.index,
                row=layer.k_elements,
                cells=cells,
                streams=streams,
            )
        )
        if not model.mla:
            # transposed, all layers' V are as wide as the widest
            row = widest if spread else layer.v_elements
            tensors.append(
                CacheTensor(
                    name=f"cache_v_l{layer.index}",
                    kind=v,
                    layer=layer.index,
                    row=row,
                    cells=cells,
                    streams=streams,
                    spread=spread,
                )
            )
    for tensor in tensors:
        row_bytes(tensor.kind, tensor.row)  # raises where ggml would stop
    return Cache(
        kind=kind or (LATENT if model.mla else FULL),
        cells=cells,
        streams=streams,
        layers=len(layers),
        tensors=tuple(tensors),
    )


def _states(model: Model, settings: Settings, chosen: Callable[[Layer], bool]) -> Cache:
    """llama_memory_recurrent: R and S of every chosen layer, f32, one row a sequence."""
    layers = [layer for layer in model.layers[: model.n_layer] if chosen(layer)]
    tensors = tuple(
        CacheTensor(
            name=f"cache_{name}_l{layer.index}",
            layer=layer.index,
            kind=F32,
            row=row,
            cells=settings.parallel,
            streams=1,
        )
        for layer in layers
        for name, row in (("r", model.state_r), ("s", model.state_s))
    )
    return Cache(kind=RECURRENT, cells=settings.parallel, streams=1, layers=len(layers), tensors=tensors)
