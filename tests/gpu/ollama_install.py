"""What ollama.sh needs besides kvpatch's own commands:

ollama_install.py pack STOCK PATCHED OUT           `ollama` of two builds into OUT/ollama.tar.xz, with their manifests
ollama_install.py layout PACKED LLAMA TARGET NAME  a build of Ollama in TARGET/stock and TARGET/patched: `ollama` as it
                                                   was packed, llama-server of LLAMA/stock and LLAMA/patched; their
                                                   CUDA backend comes into lib/ollama/NAME (cuda_v13)
ollama_install.py models SHAPE COUNT               writes models where the benchmarks look for them
"""

from __future__ import annotations

import json
import lzma
import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from kvpatch import manifest, paths
from kvpatch.bench import models, ollama_models
from kvpatch.stages import output

_SIDES = ("stock", "patched")
_ARCHIVE = "ollama.tar.xz"
_BACKEND = "libggml-cuda.so"
# The programs of both sides have much in common: the window is larger than both.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 128 << 20}]


def pack(stock: Path, patched: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (
        lzma.open(out / _ARCHIVE, "wb", filters=_FILTERS) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for side, build in zip(_SIDES, (stock, patched), strict=True):
            made = manifest.read(build)
            if made["stock"] != (side == "stock") or not made["release"]:
                raise SystemExit(f"{build} is no {side} build of Ollama")
            for name in ("bin/ollama", output.MANIFEST):
                tar.add(build / name, f"{side}/{name}")
    size = (out / _ARCHIVE).stat().st_size
    sys.stdout.write(f"{out / _ARCHIVE}: {size / 2**20:.1f} MiB\n")


def layout(packed: Path, llama: Path, target: Path, name: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tarfile.open(packed / _ARCHIVE) as tar:
        tar.extractall(target, filter="data")
    for side in _SIDES:
        _lay_out(target / side, llama / side, name)


def _lay_out(root: Path, llama: Path, name: str) -> None:
    ours, theirs = manifest.read(root), manifest.read(llama)
    commits = [_commit(made) for made in (ours, theirs)]
    # One of them may be known by the first characters alone.
    short, whole = sorted(commits, key=len)
    if not short or not whole.startswith(short):
        raise SystemExit(f"{root} is for llama.cpp {commits[0]}, {llama} is {commits[1]}")
    if ours["stock"] != theirs["stock"]:
        raise SystemExit(f"{llama} is not of the side of {root}")
    library = root / "lib" / "ollama"
    # Links stay links: a library has a name for each level of its version.
    shutil.copytree(llama / "bin", library, symlinks=True)
    if (library / _BACKEND).exists():
        # Ollama looks for devices in the folders below its libraries, and names the backend that it finds there.
        (library / name).mkdir()
        (library / _BACKEND).rename(library / name / _BACKEND)
    # What lies here now, so that `kvpatch verify` and the benchmarks take it for a build.
    body: dict[str, Any] = {**ours, "artifacts": output.describe(root), "smoke": None}
    paths.write_whole(root / output.MANIFEST, json.dumps(body, indent=2) + "\n")
    size = sum(row.get("size", 0) for row in body["artifacts"])
    sys.stdout.write(f"{root}: {len(body['artifacts'])} files, {size / 2**20:.1f} MiB, {ours['label']}\n")


def _commit(made: dict[str, Any]) -> str:
    """Of llama.cpp; of a carried tree, which has no history, what it was called when it was built."""
    (row,) = [row for row in made["sources"] if row["upstream"] == "llama.cpp"]
    return str(row["commit"] or row["ref"])


def main(words: list[str]) -> int:
    if words[:1] == ["pack"] and len(words) == 4:
        stock, patched, out = map(Path, words[1:])
        pack(stock, patched, out)
        return 0
    if words[:1] == ["layout"] and len(words) == 5:
        packed, llama, target = map(Path, words[1:4])
        layout(packed, llama, target, words[4])
        return 0
    if words[:1] == ["models"] and len(words) == 3:
        began = time.monotonic()
        shape = models.shape_named(words[1])
        folder = ollama_models.folder(shape)
        made = ollama_models.store(folder, shape, int(words[2]), bases=models.folder())
        seconds = time.monotonic() - began
        total = sum(member.bytes for member in made.members)
        sys.stdout.write(f"ok: {len(made.members)} models, {total} bytes, in {seconds:.1f} s\n")
        return 0
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
