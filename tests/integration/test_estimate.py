"""What `kvpatch.estimate` says, against what libllama allocates: equal to the byte, in every architecture it knows.

A small program, linked with the stock libllama, makes up a tiny model from metadata, writes it as a file, loads that
with all layers on the CPU and on a device that allocates as ggml-cuda does, and says how large the buffers are.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvpatch import estimate, smoke
from kvpatch.estimate import archs
from kvpatch.estimate.sizes import KV_TYPES
from tests.llama_memory import shapes

pytestmark = [pytest.mark.build, pytest.mark.timeout(3600)]

SOURCE = Path(__file__).parents[1] / "llama_memory" / "memory.cpp"
S = estimate.Settings
SETTINGS = (
    S(context=1000, parallel=2),
    S(context=4096, parallel=3, unified=False, type_k="q8_0", type_v="q8_0"),
    S(context=2048, parallel=1, flash_attn=False, ubatch=64),
    S(context=2048, parallel=4, unified=False, type_k="bf16", type_v="bf16", swa_full=True),
    S(context=300, parallel=1, batch=100, ubatch=100, type_k="q5_1", type_v="q4_0"),
    S(context=0, parallel=8, type_k="q4_1", type_v="f16"),
)
# Of these libllama stops on metadata of this size, whatever it is.
NOT_MADE_UP = {
    "plm": "its graph wants more heads than the tensors it makes up have",
    "rwkv6qwen2": "it divides by a number that only larger models have",
}
# Layers for drafting that are skipped whether wanted or not cannot be made up, and two want other arrays for them.
NEXTN_NOT_MADE_UP = {
    *("bailingmoe2", "exaone-moe", "exaone4", "glm4", "glm4moe"),
    *("nemotron_h", "nemotron_h_moe", "cohere2moe"),
}
SMALL_HEADS = {f"attention__{k}_length{s}": 64 for k in ("key", "value") for s in ("", "_swa")}
# What deviates from an architecture's usual metadata.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"attention__head_count_kv": 1}),
    ("openelm", {"attention__head_count_kv": shapes.Array((2, 1, 2, 1, 2, 1))}),
    (
        "openelm",
        {
            "attention__head_count": shapes.Array((2, 4, 2, 4, 2, 4)),
            "attention__key_length": 64,
            "attention__value_length": 64,
        },
    ),
    ("gemma3", {"attention__sliding_window": None}),
    ("gemma3", {"attention__sliding_window_pattern": None, "layers": 13}),
    ("gemma3", {**SMALL_HEADS, "attention__sliding_window": 1024}),
    ("gemma4", {"attention__shared_kv_layers": 0}),
    ("gemma4", {"attention__key_length": 256, "attention__value_length": 256}),
    ("exaone4", {"layers": 64}),
    ("llama4", {"attention__sliding_window": 0}),
    ("laguna", {"attention__sliding_window": None}),
    ("mellum", {"attention__sliding_window_pattern": 2}),
    ("cohere2moe", {"attention__sliding_window_pattern": 3}),
    ("lfm2", {"attention__sliding_window": None}),
    ("qwen35", {"attention__recurrent_layers": shapes.Array((1, 0, 0, 1, 1, 0))}),
    ("qwen3next", {"full_attention_interval": None}),
    ("minimax-01", {"full_attention_interval": None, "layers": 8}),
    ("glm-dsa", {"attention__indexer__types": shapes.Array((1, 0, 1, 0, 0, 1))}),
    ("glm-dsa", {"context_length": 1048576}),
    *((arch, {"nextn_predict_layers": 1}) for arch in sorted(archs.NEXTN - NEXTN_NOT_MADE_UP)),
    (
        "cohere2moe",
        {"nextn_predict_layers": 1, "attention__sliding_window_pattern": shapes.Array((0, 1, 1, 0, 1))},
    ),
    ("step35", {"nextn_predict_layers": 2}),
)
Ask = Callable[..., "list[str]"]


@pytest.fixture(scope="module")
def program(
    kvpatch: Callable[..., dict[str, Any]], stock: smoke.Install, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    words = ("--llama-cpp", "sdist", "--llama-cpp-source", "sdist", "--stock", "--out", stock.root)
    tree = Path(kvpatch("compile", *words)["data"]["workspace"]) / "llama.cpp"
    libraries = stock.llama_server.parent
    built = tmp_path_factory.mktemp("memory") / "memory"
    includes = [f"-I{tree / part}" for part in ("include", "src", "ggml/include", "ggml/src")]
    subprocess.run(
        ["c++", "-std=c++17", "-O1", "-Wall", "-Werror", *includes, SOURCE, f"-L{libraries}", "-lllama", "-lggml",
         "-lggml-base", f"-Wl,-rpath,{libraries}", "-o", built],
        check=True,
    )  # fmt: skip
    return built


@pytest.fixture(scope="module")
def ask(program: Path) -> Ask:
    def run(*words: str | Path, settings: Sequence[S] = ()) -> list[str]:
        lines = [
            f"{s.context} {s.parallel} {s.unified:d} {s.flash_attn:d} {s.type_k} {s.type_v} {s.batch} {s.ubatch} "
            f"{s.swa_full:d}\n"
            for s in settings
        ]
        done = subprocess.run(
            [program, *words],
            input="".join(lines),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        said = done.stdout.splitlines()
        return said if done.returncode == 0 else [*said, f"stopped: {done.stderr[-300:]}"]

    return run


def expected(path: Path, settings: S, device: str) -> str:
    """As the program says it; an error of ours where it must have one too."""
    try:
        found = estimate.estimate(path, settings, device=device)
    except estimate.EstimateError:
        return "error"
    weights, cache = found.weights, found.caches.nbytes(found.device)
    if weights.host is None:
        return f"ok {weights.device.nbytes} {cache} 0 0"
    return f"ok {weights.host.nbytes} 0 {weights.device.nbytes} {cache}"


def compare(ask: Ask, path: Path, settings: Sequence[S] = SETTINGS) -> int:
    """How many contexts were compared, and that all are equal."""
    for device, words in (("cpu", ()), ("cuda", ("--gpu",))):
        said = [
            "error" if line.startswith("error") else line for line in ask(path, *words, settings=settings)
        ]
        assert said == [expected(path, s, device) for s in settings], device
    return sum(expected(path, s, "cpu") != "error" for s in settings)


def make(ask: Ask, folder: Path, arch: str, kind: str = "f32", **more: Any) -> Path:
    """A file of that architecture; with experts where it does not load without."""
    said: list[str] = []
    for experts in (False, True):
        bare = shapes.write(folder / "bare.gguf", arch, shapes.keys(arch, experts=experts, **more))
        path = folder / f"{arch}.gguf"
        said = ask(bare, "--metadata", "--write", path, "--type", kind)
        if not said:
            return path
    raise AssertionError(f"no {arch} with {more} could be made: {said}")


@pytest.mark.parametrize("arch", sorted(archs.KNOWN))
def test_every_architecture(ask: Ask, tmp_path: Path, arch: str) -> None:
    if arch in NOT_MADE_UP:
        pytest.skip(NOT_MADE_UP[arch])
    # rows of 256 elements and blocks of 32: what ggml-cuda pads to 512
    assert compare(ask, make(ask, tmp_path, arch, "q8_0")) >= 3


@pytest.mark.parametrize(("arch", "more"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_other_metadata(ask: Ask, tmp_path: Path, arch: str, more: dict[str, Any]) -> None:
    assert compare(ask, make(ask, tmp_path, arch, **more)) >= 3


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek2", "jamba"])
def test_every_setting(ask: Ask, tmp_path: Path, arch: str) -> None:
    """Full, sliding-window, latent and hybrid caches in all combinations of what can be set."""
    more = SMALL_HEADS if arch in ("llama", "gemma2") else {}
    path = make(ask, tmp_path, arch, "q4_0", **more)
    settings = [
        S(context=c, parallel=n, unified=u, flash_attn=f, type_k=k, type_v=k if arch == "deepseek2" else v)
        for c, n, u, f, k, v in itertools.product(
            (4000,), (1, 3), (True, False), (True, False), KV_TYPES, ("f16", "q4_0")
        )
    ]
    assert compare(ask, path, settings) >= len(settings) / 3


def test_a_real_model(ask: Ask, gemma: Path) -> None:
    assert compare(ask, gemma) == len(SETTINGS)
