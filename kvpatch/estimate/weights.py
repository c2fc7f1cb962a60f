"""Where each tensor of the file goes, and the bytes of the buffers.

Follows llama_model_loader::create_tensor (which buffer type), llama_model_base::load_tensors (which layer is on which
device, all of them on the GPU), LLM_TENSOR_INFOS (what is input, output, repeating), ggml-cuda's supports_op (what
stays on the CPU after all) and ggml_backend_alloc_ctx_tensors_from_buft (alignment, sum).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvpatch.estimate import archs
from kvpatch.estimate.cache import CPU, CUDA, Device
from kvpatch.estimate.errors import EstimateError
from kvpatch.estimate.layers import Model
from kvpatch.estimate.reader import GgufModel, Tensor
from kvpatch.estimate.sizes import pad

# LLM_TENSOR_LAYER_INPUT: looked up by token on the CPU, wherever the layers are.
_INPUT = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
_BLOCK = re.compile(r"^blk\.(\d+)\.(.*)$")
# Types whose matrices ggml-cuda does not multiply.
_NOT_ON_CUDA = frozenset({"TQ1_0", "TQ2_0", "F64", "I8", "I16", "I32", "I64"})
_KIMI = ("kimi-linear", "kimi-k3")
# Whose ssm_a is taken for the operand of a scan; the two of kimi have no ssm.state_size, so ggml-cuda takes none of it.
_MAMBA = ("mamba", "mamba2", "jamba", "falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe", "plamo2")
_SSM_SCAN = frozenset((*_MAMBA, *_KIMI))


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Bytes of one buffer and how many tensors are in it."""

    device: str
    nbytes: int
    tensors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Buffers of the weights. `device`: where the layers are; `host`: what stays on the CPU then (None: everything is
    there). `tied_bytes`: of `device`, the second copy of the token embeddings, which are the output matrix too;
    `skipped_bytes`: in the file but not loaded (layers for drafting). `moved`: tensors that the GPU cannot work on.
    """

    device: Placed
    host: Placed | None
    file_bytes: int
    tied_bytes: int
    skipped_bytes: int
    moved: tuple[str, ...]


def plan_weights(gguf: GgufModel, model: Model, device: Device) -> Weights:
    """The buffers that llama.cpp makes with all layers on `device`, without memory mapping or repacking."""
    skipped = [t for t in gguf.tensors if _skipped(t, model)]
    used = [t for t in gguf.tensors if not _skipped(t, model)]
    tied = _tied(gguf, model)
    if device is CPU:
        # One buffer: the tied matrix is found in it, not copied.
        return Weights(
            device=_placed(CPU, used),
            host=None,
            file_bytes=gguf.file_bytes,
            tied_bytes=0,
            skipped_bytes=sum(t.nbytes for t in skipped),
            moved=(),
        )
    moved = [t for t in used if not _is_input(t) and not _on_cuda(t, model, gguf)]
    host = [t for t in used if _is_input(t)] + moved
    there = [t for t in used if t not in host] + ([tied] if tied else [])
    return Weights(
        device=_placed(CUDA, there),
        host=_placed(CPU, host),
        file_bytes=gguf.file_bytes,
        tied_bytes=_alloc(CUDA, tied) if tied else 0,
        skipped_bytes=sum(t.nbytes for t in skipped),
        moved=tuple(t.name for t in moved),
    )


def _alloc(device: Device, tensor: Tensor) -> int:
    return pad(device.alloc_bytes(tensor.kind, tensor.shape[0], tensor.nbytes), device.alignment)


def _placed(device: Device, tensors: list[Tensor]) -> Placed:
    return Placed(device=device.name, nbytes=sum(_alloc(device, t) for t in tensors), tensors=len(tensors))


def _is_input(tensor: Tensor) -> bool:
    return tensor.name.partition(".")[0] in _INPUT


def _skipped(tensor: Tensor, model: Model) -> bool:
    block = _BLOCK.match(tensor.name)
    if not block or int(block[1]) < model.n_layer:
        return False
    stem = re.sub(r"\.(weight|bias|scale|input_scale)$", "", block[2])
    return stem not in archs.DRAFTING_LOADED.get(model.arch, frozenset())


def _tied(gguf: GgufModel, model: Model) -> Tensor | None:
    """The token embeddings, if they are the output matrix too."""
    if gguf.has_tensor("output.weight") or model.arch in archs.NO_OUTPUT:
        return None
    found = next((t for t in gguf.tensors if t.name == "token_embd.weight"), None)
    if found is None or model.arch in archs.NEVER_TIED:
        missing = "token_embd.weight" if found is None else "output.weight"
        raise EstimateError(
            f"{gguf.paths[0]} has no tensor {missing}: llama.cpp does not load {model.arch} without it"
        )
    return found


def _on_cuda(tensor: Tensor, model: Model, gguf: GgufModel) -> bool:
    block = _BLOCK.match(tensor.name)
    base = block[2] if block else tensor.name
    if base == "ssm_conv1d.weight":
        return tensor.shape[1] % 128 == 0
    if base == "ssm_a" and model.arch in _SSM_SCAN:
        return _scans(tensor, model, gguf)
    return tensor.kind.name not in _NOT_ON_CUDA


def _scans(tensor: Tensor, model: Model, gguf: GgufModel) -> bool:
    """ggml-cuda's condition on GGML_OP_SSM_SCAN."""
    if model.arch in _KIMI:
        return False
    rows, heads = tensor.shape[0], tensor.shape[1] if len(tensor.shape) > 1 else 1
    head_size = int(gguf.need("ssm.inner_size")) // heads
    if rows == 1:
        return int(gguf.need("ssm.state_size")) in (128, 256) and head_size % 16 == 0
    groups = int(gguf.get("ssm.group_count", 0)) if model.arch not in ("mamba", "jamba") else 0
    return rows == 16 and head_size == 1 and heads % 128 == 0 and groups <= 1
