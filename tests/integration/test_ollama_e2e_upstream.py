"""Ollama's own integration tests (its folder integration/) on a patched build with elastic memory on, with a model
that is not pulled: Gemma 3 270M from the package index.

Those named here pass with it. The others cannot show anything here: models by name that only Ollama's registry
has (embeddings, vision, audio, tools, thinking, create from safetensors, quantization, image generation,
scheduler-multimodel, num-predict, list and show of llama3.2); or answers that a model of this size, which comes
without a template, does not give (blue-sky, api-generate, api-chat: they look for words, or for an end of the
answer). concurrent-chat and generate-history skip by themselves: too little time, not every runner has it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvpatch import hashing, paths
from kvpatch.smoke.install import Install
from kvpatch.smoke.models import LLAMA, TinyModel
from kvpatch.smoke.ollama import Instance, create
from kvpatch.smoke.server import serve
from kvpatch.sources import OLLAMA, Pin, Store
from tests.integration.test_ollama_e2e import patched_ollama, stock_ollama
from tests.ollama_e2e import sides

__all__ = ["patched_ollama", "stock_ollama"]
pytestmark = [pytest.mark.ollama, pytest.mark.timeout(7200)]

PINNED = "v0.32.15"
MODEL = "gemma3:270m"
PASSED = (
    "TestAPI/generate-logprobs/gemma3:270m/no_logprobs",
    "TestAPI/generate-logprobs/gemma3:270m/logprobs_only",
    "TestAPI/generate-logprobs/gemma3:270m/logprobs_with_top_5",
    "TestAPI/chat-logprobs/gemma3:270m",
    "TestContext/context-long-input/gemma3:270m",
)


def test_those_that_a_local_model_can_pass(
    patched_ollama: Install, ollama_source: str, gemma: Path, tmp_path: Path
) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler on PATH")
    store = Store(paths.cache_root())
    pin = Pin(ref=PINNED, commit=None, sha256=None)
    tree = store.materialize(store.resolve(OLLAMA, ollama_source, pin), tmp_path / "ollama")
    model = TinyModel(path=gemma, seed=0, shape=LLAMA, sha256=hashing.of_file(gemma))
    settings = {sides.ENABLED: "true", sides.LIMIT: "2GB", sides.MAX_CTX: "8192"}
    instance = Instance(install=patched_ollama, folder=tmp_path, name="upstream", settings=settings)
    with serve(instance.spec(), tmp_path) as server:
        create(server, MODEL, model)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_", "KVCACHED_"))}
        env |= {"GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false", "OLLAMA_HOST": server.url}
        env |= {"OLLAMA_TEST_EXISTING": "1", "OLLAMA_TEST_MODEL": MODEL}
        argv = [go, "test", "-tags=integration,fast", "-v", "-count=1", "-timeout=10m"]
        done = subprocess.run(
            [
                *argv,
                "-run",
                "Test(API|Context)/(generate-logprobs|chat-logprobs|context-long)",
                "./integration/",
            ],
            cwd=tree.path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        log = server.log_text()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.findall(r"^\s*--- PASS: (\S+)", done.stdout, re.MULTILINE)
    assert set(PASSED) <= set(passed), passed
    assert "kvcached: admitted" in log
