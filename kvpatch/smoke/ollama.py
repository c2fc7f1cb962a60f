"""Talking to `ollama serve`: an instance of its own for a check, with its own home, models and port, and the
calls that its API answers."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpatch import process
from kvpatch.smoke import smaps
from kvpatch.smoke.holdings import Holdings
from kvpatch.smoke.install import Install
from kvpatch.smoke.llama import witness
from kvpatch.smoke.models import TinyModel
from kvpatch.smoke.server import Server, ServerSpec

CONTEXT = 8192
_POLL_SECONDS = 0.02
_KV_FIELDS = ("kv_mapped", "kv_reserved", "lease", "charge", "limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One `ollama serve`. `settings` are environment variables; `config`, unless None, is the text of
    ~/.ollama/config.yaml."""

    install: Install
    folder: Path
    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None

    @property
    def home(self) -> Path:
        return self.folder / f"home-{self.name}"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    @property
    def binary(self) -> Path:
        assert self.install.ollama is not None
        return self.install.ollama

    def env(self, port: int) -> dict[str, str]:
        """Environment of the server and of its command line: nothing of the user's own Ollama is touched."""
        return {
            "HOME": str(self.home),
            "OLLAMA_MODELS": str(self.folder / "models-store"),
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "OLLAMA_NO_CLOUD": "true",
            "OLLAMA_NOPRUNE": "true",
            "KVCACHED_LEDGER": str(self.ledger),
            **self.settings,
        }

    def spec(self) -> ServerSpec:
        dot = self.home / ".ollama"
        dot.mkdir(parents=True, exist_ok=True)
        settings = dot / "config.yaml"
        settings.unlink(missing_ok=True)
        if self.config is not None:
            settings.write_text(self.config, encoding="utf-8")
        return ServerSpec(
            name=f"ollama-{self.name}",
            argv=lambda port: [self.binary, "serve"],
            ready_path="/api/version",
            env=self.env,
        )

    def command(self, port: int, *words: str) -> str:
        """Output of `ollama WORDS`. Raises ProcessFailure when it fails."""
        log = self.folder / f"command-{self.name}-{words[0].lstrip('-')}.log"
        lines: list[str] = []
        process.run(
            [self.binary, *words],
            env=self.env(port),
            cwd=self.folder,
            log=log,
            timeout=30.0,
            on_line=lines.append,
        )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A model as /api/ps shows it. `size` is Ollama's own figure, in bytes; `kv` is its `kvcached` object, None when it
    has none."""

    name: str
    size: int
    kv: Mapping[str, Any] | None

    def bytes(self, server: Server, key: str) -> int:
        """A number of the `kvcached` object."""
        value = (self.kv or {}).get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise server.failed(f"/api/ps: kvcached.{key} of {self.name} is {value!r}, not a number of bytes")
        return value


def create(server: Server, name: str, model: TinyModel) -> None:
    """Upload a model file and make a model of it."""
    digest = f"sha256:{model.sha256}"
    answer = server.request("POST", f"/api/blobs/{digest}", data=model.path.read_bytes())
    if answer.status_code not in (200, 201):
        raise server.failed(
            f"uploading {model.path.name} was answered {answer.status_code}: {answer.text[:300]}"
        )
    body = {"model": name, "files": {model.path.name: digest}, "stream": False}
    status = server.json("POST", "/api/create", json=body).get("status")
    if status != "success":
        raise server.failed(f"creating {name} ended with status {status!r}")


def options(count: int) -> dict[str, object]:
    return {"num_ctx": CONTEXT, "num_predict": count, "temperature": 0, "seed": 1, "num_thread": 1}


def generate(server: Server, model: str, prompt: str, count: int) -> str:
    """A completion of `count` tokens, greedy, without a template."""
    body = {"model": model, "prompt": prompt, "raw": True, "stream": False, "options": options(count)}
    answer = server.json("POST", "/api/generate", json=body)
    return _counted(server, answer, answer.get("response"), count)


def generate_stream(server: Server, model: str, prompt: str, count: int) -> tuple[str, int]:
    """As `generate`, piece by piece: the text joined, and how many pieces it came in."""
    body = {"model": model, "prompt": prompt, "raw": True, "stream": True, "options": options(count)}
    answer = server.request("POST", "/api/generate", json=body)
    if answer.status_code != 200:
        raise server.failed(f"a streamed completion was answered {answer.status_code}: {answer.text[:300]}")
    try:
        pieces: Sequence[dict[str, Any]] = [
            json.loads(line) for line in answer.text.splitlines() if line.strip()
        ]
    except ValueError as error:
        raise server.failed(f"the stream is not lines of JSON: {answer.text[:300]}") from error
    if not pieces or not pieces[-1].get("done"):
        raise server.failed(f"the stream ends without `done` after {len(pieces)} pieces")
    text = "".join(str(piece.get("response", "")) for piece in pieces)
    return _counted(server, pieces[-1], text, count), sum(1 for piece in pieces if piece.get("response"))


def chat(server: Server, model: str, message: str, count: int) -> str:
    """An answer of `count` tokens to one message, through the model's own template."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": message}],
        "stream": False,
        "options": options(count),
    }
    answer = server.json("POST", "/api/chat", json=body)
    said = answer.get("message")
    return _counted(server, answer, said.get("content") if isinstance(said, dict) else None, count)


def embed(server: Server, model: str, texts: Sequence[str]) -> list[list[float]]:
    """Embeddings of texts."""
    answer = server.json("POST", "/api/embed", json={"model": model, "input": list(texts)})
    vectors = answer.get("embeddings")
    if not isinstance(vectors, list) or len(vectors) != len(texts) or not all(vectors):
        raise server.failed(
            f"/api/embed gave no embedding for each of {len(texts)} texts: {str(answer)[:300]}"
        )
    return [[float(x) for x in vector] for vector in vectors]


def stop(server: Server, model: str) -> None:
    """Unload a model now (keep_alive 0)."""
    answer = server.json("POST", "/api/generate", json={"model": model, "keep_alive": 0, "stream": False})
    if answer.get("done_reason") != "unload":
        raise server.failed(f"unloading {model} was answered {str(answer)[:300]}")


def loaded(server: Server) -> dict[str, Loaded]:
    """Models in memory, by name."""
    models = server.json("GET", "/api/ps").get("models")
    if not isinstance(models, list):
        raise server.failed("/api/ps has no list of models")
    found = {}
    for model in models:
        name = str(model.get("name", "")).removesuffix(":latest")
        kv = model.get("kvcached")
        found[name] = Loaded(
            name=name, size=int(model.get("size", 0)), kv=kv if isinstance(kv, dict) else None
        )
    return found


def wait_gone(server: Server, names: Sequence[str], *, seconds: float = 10.0) -> float:
    """Wait until these models are unloaded; when none is left, until no child process is either."""
    begin = time.monotonic()
    while True:
        left = loaded(server)
        if not any(name in left for name in names) and (left or not server.descendants()):
            return time.monotonic() - begin
        if time.monotonic() - begin > seconds:
            raise server.failed(
                f"{seconds:g} s after being stopped: models {sorted(left)}, children {server.descendants()}"
            )
        time.sleep(_POLL_SECONDS)


def children(server: Server) -> tuple[int, ...]:
    """The llama-server processes of an instance."""
    found = []
    for pid in server.descendants():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/exe").readlink().name == "llama-server":
                found.append(pid)
    return tuple(found)


def witnessed(server: Server, instance: Instance, *, settle: float = 1.0) -> tuple[smaps.Usage, Holdings]:
    """What the kernel shows of the KV cache of the one llama-server that runs, and what it holds by the ledger."""
    pids = children(server)
    if len(pids) != 1:
        raise server.failed(f"expected one llama-server, found {len(pids)}")
    seen = witness(instance.install, instance.ledger, server.log_text(), pids[0], settle=settle)
    if seen is None:
        raise server.failed("no address range of an elastic cache in the log")
    return seen


def kv_fields(server: Server, model: Loaded) -> dict[str, int]:
    """The figures of a model's `kvcached` object. Raises CheckFailed when one is missing."""
    return {
        key: model.bytes(server, key) for key in _KV_FIELDS if key != "limit" or "limit" in (model.kv or {})
    }


def _counted(server: Server, answer: Mapping[str, Any], text: object, count: int) -> str:
    if not isinstance(text, str) or answer.get("eval_count") != count:
        raise server.failed(f"asked for {count} tokens, got {answer.get('eval_count')}: {str(answer)[:300]}")
    return text
