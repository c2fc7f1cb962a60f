"""From files: what is read of them, what is refused, and the command."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvpatch import cli
from kvpatch.errors import SourceError
from kvpatch.estimate import (
    EstimateError,
    GgufModel,
    Model,
    Settings,
    UnknownArchitectureError,
    derive,
    estimate,
    plan_caches,
    plan_weights,
    read,
)
from kvpatch.estimate.cache import CPU, CUDA
from kvpatch.smoke import models


def with_keys(arch: str, **keys: Any) -> GgufModel:
    """Metadata as the reader gives it."""
    base = {"block_count": 6, "embedding_length": 256, "context_length": 4096, "attention.head_count": 4}
    values = base | {k.replace("__", "."): v for k, v in keys.items()}
    return GgufModel(
        paths=(Path("model.gguf"),),
        arch=arch,
        tensors=(),
        metadata={f"{arch}.{k}": v for k, v in values.items()},
    )


def sliding(model: Model) -> list[int]:
    return [layer.index for layer in model.layers if layer.sliding]


def recurrent(model: Model) -> list[int]:
    return [layer.index for layer in model.layers if layer.recurrent]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return models.tiny_llama(tmp_path / "llama.gguf", 1).path


def write(
    path: Path, arch: str, tensors: Sequence[tuple[str, Sequence[int], str]], **keys: int | str
) -> Path:
    """A file with these tensors, all zero: (name, shape with the row's elements first, type)."""
    writer = gguf.GGUFWriter(path, arch)
    base: dict[str, int | str] = {
        f"{arch}.block_count": 1,
        f"{arch}.embedding_length": 256,
        f"{arch}.context_length": 4096,
        f"{arch}.attention.head_count": 4,
    }
    for key, value in (base | {k.replace("__", "."): v for k, v in keys.items()}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif key.startswith("split."):
            (writer.add_int32 if key == "split.tensors.count" else writer.add_uint16)(key, value)
        else:
            writer.add_uint32(key, value)
    for name, shape, kind in tensors:
        quantised = gguf.GGMLQuantizationType[kind.upper()]
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        data = np.zeros((*reversed(shape[1:]), shape[0] // block * size), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------------------------ weights --


def test_weights_by_hand(tmp_path: Path) -> None:
    """A row of 256 elements of q4_0 is 144 bytes; ggml-cuda pads the last to 512 elements, then all to 128 bytes."""
    path = write(
        tmp_path / "m.gguf",
        "llama",
        [
            ("token_embd.weight", (256, 10), "q4_0"),
            ("output_norm.weight", (256,), "f32"),
            ("blk.0.attn_q.weight", (256, 3), "q4_0"),
            ("blk.0.attn_norm.weight", (257,), "f32"),
        ],
    )
    file, model = read(path), derive(read(path))
    cpu = plan_weights(file, model, CPU)
    # 1028 is rounded up to a multiple of 32
    assert (cpu.device.nbytes, cpu.host, cpu.tied_bytes) == (1440 + 1024 + 3 * 144 + 16 + 1056, None, 0)
    cuda = plan_weights(file, model, CUDA)
    assert cuda.host is not None
    assert (cuda.host.nbytes, cuda.host.tensors) == (1440, 1)
    assert cuda.tied_bytes == 1664  # 1440 + 144 = 1584
    assert (cuda.device.nbytes, cuda.device.tensors) == (1664 + 1024 + 640 + 1152, 4)


def test_an_output_matrix_of_its_own_is_no_second_copy(llama: Path) -> None:
    weights = plan_weights(read(llama), derive(read(llama)), CUDA)
    assert weights.tied_bytes == 0


def test_weights_for_drafting_are_not_loaded(tmp_path: Path) -> None:
    tensors = [
        ("token_embd.weight", (256, 10), "f32"),
        ("output.weight", (256, 10), "f32"),
        ("blk.0.attn_norm.weight", (256,), "f32"),
        ("blk.1.attn_norm.weight", (256,), "f32"),
    ]
    path = write(
        tmp_path / "m.gguf", "glm4moe", tensors, glm4moe__block_count=2, glm4moe__nextn_predict_layers=1
    )
    found = estimate(path, Settings(context=256), device="cpu")
    assert (found.weights.skipped_bytes, found.weights.device.nbytes) == (1024, 2 * 10240 + 1024)
    # but cells are reserved for them: glm4moe's cache leaves out none of its layers
    assert found.caches.caches[0].layers == 2


def test_types_that_the_gpu_does_not_multiply_stay_on_the_cpu(tmp_path: Path) -> None:
    tensors = [
        ("token_embd.weight", (256, 10), "f32"),
        ("output.weight", (256, 10), "f32"),
        ("blk.0.ffn_up.weight", (256, 2), "tq2_0"),
    ]
    weights = estimate(write(tmp_path / "m.gguf", "bitnet", tensors), Settings(context=256)).weights
    assert weights.moved == ("blk.0.ffn_up.weight",)
    assert weights.host is not None
    assert weights.host.nbytes == 10240 + 160


# ------------------------------------------------------------------------------------------------------- layers --


def test_layers_that_slide() -> None:
    """By each architecture's own period, or the file's."""
    every = with_keys
    assert sliding(derive(every("gemma2"))) == [0, 2, 4]
    assert derive(every("gemma2")).window == 4096
    assert sliding(derive(every("gemma3", attention__sliding_window=512))) == [0, 1, 2, 3, 4]
    assert sliding(derive(every("gemma3"))) == []
    assert sliding(
        derive(every("gpt-oss", attention__sliding_window=128, attention__sliding_window_pattern=3))
    ) == [0, 1, 3, 4]
    assert sliding(derive(every("laguna", attention__sliding_window=128))) == [1, 2, 3, 5]
    assert derive(every("smallthinker", attention__sliding_window=7)).window == 4096
    assert derive(every("llama4")).window == 8192
    assert derive(every("llama4", attention__sliding_window=0)).window == 0
    flags = (1, 0, 1, 1, 0, 1)
    assert sliding(
        derive(every("step35", attention__sliding_window=9, attention__sliding_window_pattern=flags))
    ) == [0, 2, 3, 5]
    with pytest.raises(EstimateError, match="no layer that uses it"):
        derive(every("gemma2", attention__sliding_window_pattern=1))
    with pytest.raises(EstimateError, match=r"has no key step35\.attention\.sliding_window_pattern"):
        derive(every("step35", attention__sliding_window=9))


def test_layers_that_are_recurrent() -> None:
    ssm = {"ssm__conv_kernel": 4, "ssm__inner_size": 512, "ssm__state_size": 16, "ssm__group_count": 2}
    heads = (2, 0, 0, 2, 0, 0)
    jamba = derive(with_keys("jamba", attention__head_count_kv=heads, **ssm))
    assert recurrent(jamba) == [1, 2, 4, 5]
    # 3 * 512 elements of R: jamba has no groups; 512 * 16 of S
    assert (jamba.state_r, jamba.state_s) == (1536, 8192)
    qwen = derive(with_keys("qwen3next", **ssm))
    assert recurrent(qwen) == [0, 1, 2, 4, 5]
    assert qwen.state_r == 3 * (512 + 2 * 2 * 16)
    kinds = [(c.kind, c.layers) for c in plan_caches(qwen, Settings()).caches]
    assert kinds == [("full attention", 1), ("recurrent state", 5)]
    falcon = plan_caches(derive(with_keys("falcon-h1", **ssm)), Settings())
    assert [(c.kind, c.layers) for c in falcon.caches] == [("full attention", 6), ("recurrent state", 6)]


def test_layers_that_share_a_cache() -> None:
    shared = derive(
        with_keys(
            "gemma4",
            attention__sliding_window=64,
            attention__sliding_window_pattern=(1, 0, 1, 0, 1, 0),
            attention__shared_kv_layers=2,
            attention__key_length_swa=32,
            attention__value_length_swa=32,
        )
    )
    full, ring = plan_caches(shared, Settings()).caches
    assert [t.layer for t in full.tensors] == [1, 1, 3, 3]
    assert [(t.layer, t.row) for t in ring.tensors] == [(0, 128), (0, 128), (2, 128), (2, 128)]


def test_heads_by_layer_and_sizes_of_their_own() -> None:
    model = derive(with_keys("llama", attention__head_count_kv=(4, 2, 1, 4, 2, 1), attention__key_length=80))
    assert [layer.k_elements for layer in model.layers] == [320, 160, 80, 320, 160, 80]
    assert [layer.v_elements for layer in model.layers] == [256, 128, 64, 256, 128, 64]
    with pytest.raises(EstimateError, match="has 2 entries for 6 layers"):
        derive(with_keys("llama", attention__head_count_kv=(4, 2)))


def test_an_indexer_has_keys_of_its_own() -> None:
    keys: dict[str, Any] = {
        "attention__head_count_kv": 1,
        "attention__key_length": 576,
        "attention__value_length": 512,
        "attention__key_length_mla": 192,
        "attention__value_length_mla": 128,
        "attention__indexer__key_length": 64,
        "nextn_predict_layers": 1,
    }
    latent, indexer = plan_caches(derive(with_keys("deepseek32", **keys)), Settings()).caches
    assert (latent.kind, latent.layers, latent.cell_bytes) == ("latent attention (MLA)", 5, 5 * 576 * 2)
    assert (indexer.kind, indexer.layers, indexer.cell_bytes) == ("indexer keys", 5, 5 * 64 * 2)


@pytest.mark.parametrize("arch", ["deepseek4", "t5", "gemma4-assistant", "somebody-elses"])
def test_what_cannot_be_derived_is_named(arch: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=f"'{arch}' cannot be derived exactly"):
        derive(with_keys(arch))
    with pytest.raises(UnknownArchitectureError, match="num_loops"):
        derive(with_keys("nanbeige", num_loops=2))


def test_models_without_a_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "bert", [("token_embd.weight", (256, 10), "f32")])
    found = estimate(path, Settings(parallel=1))
    assert found.caches.caches == ()
    assert found.mapped.mapped == 0
    assert found.weights.tied_bytes == 0


# -------------------------------------------------------------------------------------------------------- files --


def test_the_files_words_are_not_kept(llama: Path) -> None:
    file = read(llama)
    assert file.arch == "llama"
    assert file.get("attention.head_count") == 4
    assert not [key for key in file.metadata if key.startswith("tokenizer.ggml.tokens")]
    by_package = {t.name: (int(t.n_bytes), int(t.data_offset)) for t in gguf.GGUFReader(llama).tensors}
    assert {t.name: (t.nbytes, t.offset) for t in file.tensors} == by_package


def test_a_file_that_is_no_model(tmp_path: Path, llama: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_bytes(b"hello, this is no model")
    with pytest.raises(EstimateError, match="no GGUF file: it starts with b'hell'"):
        read(text)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    with pytest.raises(EstimateError, match="no GGUF file"):
        read(empty)
    with pytest.raises(EstimateError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(SourceError, match="cannot open the model"):
        read(tmp_path / "absent.gguf")


def test_a_file_that_is_cut_off(tmp_path: Path, llama: Path) -> None:
    """Anywhere: in the header, in the vocabulary, in the list of tensors, in the last tensor."""
    whole = llama.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (4, 8, 20, 25, 100, 1000, 5000, 9000, 20000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(EstimateError, match="is cut off or damaged"):
            read(cut)


def test_a_type_that_is_not_known(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", [("token_embd.weight", (256, 10), "f32")])
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    with pytest.raises(EstimateError, match="of a type that is not known here: 999"):
        read(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general__type": "adapter"}, "is a LoRA adapter"),
        ({"general__type": "mmproj"}, "is a multimodal projector"),
        ({"general__type": "imatrix"}, "is an importance matrix"),
    ],
)
def test_files_that_go_beside_a_model(tmp_path: Path, keys: dict[str, str], words: str) -> None:
    path = write(tmp_path / "m.gguf", "llama", [("token_embd.weight", (256, 10), "f32")], **keys)
    with pytest.raises(EstimateError, match=words):
        read(path)


def test_a_projector_and_a_vocabulary(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.gguf", "clip", [("v.patch_embd.weight", (256, 10), "f32")])
    with pytest.raises(EstimateError, match="is a multimodal projector"):
        read(clip)
    with pytest.raises(EstimateError, match="it holds a vocabulary only"):
        read(write(tmp_path / "vocab.gguf", "llama", []))


def parts(folder: Path, count: int = 2, tensors: int = 2) -> list[Path]:
    found = []
    for number in range(count):
        name = "token_embd.weight" if number == 0 else f"blk.{number - 1}.attn_norm.weight"
        path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        keys = {"split__no": number, "split__count": count, "split__tensors__count": tensors}
        found.append(write(path, "llama", [(name, (256,), "f32")], **keys))
    return found


def test_a_model_in_parts(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    file = read(first)
    assert file.paths == (first, second)
    assert [(t.name, t.part) for t in file.tensors] == [
        ("token_embd.weight", 0),
        ("blk.0.attn_norm.weight", 1),
    ]
    assert file.file_bytes == first.stat().st_size + second.stat().st_size
    with pytest.raises(EstimateError, match="is part 2 of 2") as caught:
        read(second)
    assert caught.value.hint == "name the first part: m-00001-of-00002.gguf"
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(EstimateError, match="is the first of 2 parts but is not called so"):
        read(renamed)
    renamed.rename(first)
    second.unlink()
    with pytest.raises(EstimateError, match=r"of the others are missing: m-00002-of-00002\.gguf"):
        read(first)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = parts(tmp_path, tensors=3)
    with pytest.raises(EstimateError, match="hold 2 tensors of 3"):
        read(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(EstimateError, match="is no part 2 of 2"):
        read(first)


# ------------------------------------------------------------------------------------------------------ command --


def run(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> tuple[str, str]:
    assert cli.run(["estimate", *map(str, words)]) == code
    out, err = capsys.readouterr()
    return out, err


def test_the_command_in_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = models.tiny_swa(tmp_path / "swa.gguf", 1).path
    out, err = run(capsys, path, "--num-ctx", "8192", "--budget", "20GB", "--page-size", "4KiB")
    assert not err
    for words in (
        "8,192 cells, 4 slots in one unified stream, up to 8,192 cells a slot",
        "of these, the embeddings again, as output matrix",
        "sliding window",
        "mapped at 1,000 tokens",
        "elastic, all awake, 1,000 tokens each",
    ):
        assert words in out


def test_the_command_for_programs(capsys: pytest.CaptureFixture[str], llama: Path) -> None:
    out, err = run(capsys, llama, "--json", "--num-ctx", "65536", "--parallel", "2", "--device", "cpu")
    found = json.loads(out)["data"]["estimate"]
    assert found["settings"]["unified"] is False
    assert found["caches"][0]["cells"] == 32768
    # 4 layers, K and V, 2 heads of 32, f16
    assert found["token_bytes"] == 4 * 2 * 64 * 2
    assert found["cache_bytes"] == 65536 * 1024
    assert found["budget"] is None
    assert found["warnings"] == []
    assert not err
    out, err = run(capsys, llama, "--json", "--num-ctx", "65536")
    assert "warning: 65536 cells a sequence are more than the 32768" in err
    assert len(json.loads(out)["data"]["estimate"]["warnings"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-ctx", "-1"), "cannot be negative"),
        (("--budget", "twenty"), "--budget 'twenty' is no size"),
        (("--page-size", "3MiB"), "power of two"),
        (("--kv-type", "q3_k"), "no type of a KV cache"),
        (("--kv-type", "q4_0", "--no-flash-attn"), "needs flash attention"),
        (("--device", "tpu"), "'tpu' is no device"),
        (("--tokens", "99999"), "do not fit"),
    ],
)
def test_the_commands_errors(
    capsys: pytest.CaptureFixture[str], llama: Path, words: tuple[str, ...], message: str
) -> None:
    _, err = run(capsys, llama, *words, code=2)
    assert message in err


def test_the_command_names_an_unknown_architecture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", "marvin", [("token_embd.weight", (256, 10), "f32")])
    out, _ = run(capsys, path, "--json", code=2)
    (error,) = json.loads(out)["errors"]
    assert (error["code"], error["data"]) == ("estimate-architecture", {"architecture": "marvin"})
