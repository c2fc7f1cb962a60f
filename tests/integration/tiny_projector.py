"""A projector for images, tiny and random, and images for it."""

from __future__ import annotations

import base64
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

SIDE, PATCH, WIDTH, LAYERS = 128, 4, 32, 2
TOKENS = (SIDE // PATCH) ** 2  # of an image


def tiny_projector(path: Path, embd: int) -> None:
    """For models of this embedding length."""
    random = np.random.default_rng(7)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for name, value in (
        ("image_size", SIDE),
        ("patch_size", PATCH),
        ("embedding_length", WIDTH),
        ("feed_forward_length", WIDTH),
        ("block_count", LAYERS),
        ("projection_dim", embd),
        ("attention.head_count", 2),
    ):
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", [0.5, 0.5, 0.5])
    writer.add_tensor("v.patch_embd.weight", normal(WIDTH, 3, PATCH, PATCH))
    writer.add_tensor("v.position_embd.weight", normal(TOKENS, WIDTH))
    for layer, columns in ((0, WIDTH), (2, embd)):
        writer.add_tensor(f"mm.{layer}.weight", normal(embd, columns))
        writer.add_tensor(f"mm.{layer}.bias", np.zeros(embd, np.float32))
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
            writer.add_tensor(f"v.blk.{layer}.{name}.weight", normal(WIDTH, WIDTH))
            writer.add_tensor(f"v.blk.{layer}.{name}.bias", np.zeros(WIDTH, np.float32))
        for name in ("ln1", "ln2"):
            writer.add_tensor(f"v.blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
            writer.add_tensor(f"v.blk.{layer}.{name}.bias", np.zeros(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def image(salt: int) -> str:
    """Noise, as the URL of a chat message's image."""
    pixels = np.random.default_rng(salt).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    picture = b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes()
    return "data:image/x-portable-pixmap;base64," + base64.b64encode(picture).decode()
