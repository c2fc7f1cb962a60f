"""Models of one shape in an Ollama store, as many as are wanted, each a file of its own.

To Ollama a model is the digest of its file. Each file here is a copy of one that was written from nothing, with
another name in its metadata and other signs in its last norm: enough to give every model a digest and answers of its
own, at the price of a copy. The manifest is written beside it: nothing is uploaded, nor copied by `ollama create`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from kvpatch import paths
from kvpatch.bench import models
from kvpatch.bench.models import Model, Shape
from kvpatch.errors import UsageError

# A host that is nobody's: what is not in the store is not found elsewhere either.
_HOST = "kvpatch.invalid"
_NAMESPACE = "bench"
_TAG = "latest"
_NORM = "output_norm.weight"
_CHUNK = 16 << 20
_AT_ONCE = 4
_MODEL = "application/vnd.ollama.image.model"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A model by the name that Ollama knows it by."""

    name: str
    file: Path

    @property
    def digest(self) -> str:
        """As llama-server's command line has it."""
        return self.file.name.removeprefix("sha256-")

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """A folder for OLLAMA_MODELS, and what is in it."""

    folder: Path
    members: tuple[Member, ...]


def folder(shape: Shape, cache: Path | None = None) -> Path:
    """Where the models of a shape are kept."""
    return paths.cache_root(cache) / "bench" / f"ollama-{shape.name}"


def store(folder: Path, shape: Shape, count: int, *, bases: Path) -> Store:
    """`count` models of this shape in `folder`; those of an earlier call are used again. `bases`: where the file that
    is copied is kept."""
    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    base = models.ensure(bases, shape)
    # Reading and hashing release the interpreter's lock.
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        members = pool.map(lambda number: _member(folder, base, number), range(1, count + 1))
        return Store(folder=folder, members=tuple(members))


def _member(folder: Path, base: Model, number: int) -> Member:
    short = f"{base.path.stem}-{number}"
    name = f"{_HOST}/{_NAMESPACE}/{short}"
    manifest = folder / "manifests" / _HOST / _NAMESPACE / short / _TAG
    if manifest.is_file():
        known = json.loads(manifest.read_text(encoding="utf-8"))["layers"][0]
        file = _blob(folder, known["digest"])
        if file.is_file() and file.stat().st_size == known["size"]:
            return Member(name=name, file=file)
    temporary = folder / "blobs" / f"part-{short}"
    _copy(base.path, temporary)
    vary(temporary, number)
    digest, size = _sha256(temporary), temporary.stat().st_size
    file = _blob(folder, digest)
    temporary.replace(file)
    config = json.dumps(_config(digest), separators=(",", ":")).encode()
    config_digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    paths.write_whole(_blob(folder, config_digest), config)
    body = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": {"mediaType": _CONFIG, "digest": config_digest, "size": len(config)},
        "layers": [{"mediaType": _MODEL, "digest": digest, "size": size}],
    }
    manifest.parent.mkdir(parents=True, exist_ok=True)
    paths.write_whole(manifest, json.dumps(body, separators=(",", ":")))
    return Member(name=name, file=file)


def vary(path: Path, number: int) -> None:
    """Give a file that `models.write` wrote a name and signs of its own."""
    reader: Any = gguf.GGUFReader(path, "r+")
    if not 0 < number < 100:
        raise UsageError(f"there is no model number {number}: 1 to 99")
    text = reader.fields["general.name"].parts[-1]
    # The length must stay: what follows in the file does not move.
    text[-2:] = np.frombuffer(f"{number:02d}".encode(), dtype=np.uint8)
    norm = next(tensor for tensor in reader.tensors if tensor.name == _NORM)
    signs = np.random.RandomState(number).randint(0, 2, size=norm.data.shape) * 2 - 1
    norm.data[:] = signs.astype(np.float32)
    reader.data.flush()


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        left = source.stat().st_size
        try:
            while left:
                done = os.copy_file_range(read.fileno(), write.fileno(), left)
                if not done:
                    raise OSError(f"{source} became shorter")
                left -= done
            return
        except OSError:  # not on every file system
            read.seek(0)
            write.seek(0)
            write.truncate()
        shutil.copyfileobj(read, write, _CHUNK)


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hashed.update(chunk)
    return f"sha256:{hashed.hexdigest()}"


def _blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / digest.replace(":", "-")


def _config(digest: str) -> dict[str, Any]:
    return {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "file_type": "Q4_0",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
