"""What llama.sh needs of kvpatch: the flags of a build, and the manifest of one that was made without `kvpatch build`
(a machine without network has no git repository to fetch from).

  llama_install.py flags                               one CMake flag a line
  llama_install.py manifest SOURCE.json DIR stock|patched
  llama_install.py unpack ARCHIVE DIR                  files get the time of now, so that a build sees them as changed
  llama_install.py pack DIR OUT FOLDER...              folders of DIR into OUT/bins.tar.xz.0, .1, ...
  llama_install.py join BINS DIR                       and back
  llama_install.py model SHAPE                         writes a model where the stages look for it
"""

from __future__ import annotations

import io
import itertools
import json
import lzma
import sys
import tarfile
import time
from pathlib import Path

from kvpatch import manifest
from kvpatch.bench import models
from kvpatch.stages import compile as compile_stage
from kvpatch.stages import output

_NAME = "bins.tar.xz"
_PART = 15 << 20
# Most of two builds is the same bytes: one archive, with a window larger than both.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 512 << 20}]


def pack(folder: Path, out: Path, names: list[str]) -> None:
    for old in out.glob(f"{_NAME}.*"):
        old.unlink()
    whole = out / f"{_NAME}.whole"
    with lzma.open(whole, "wb", filters=_FILTERS) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for name in names:
            tar.add(folder / name, name)
    with whole.open("rb") as file:
        for number in itertools.count():
            part = file.read(_PART)
            if not part:
                break
            (out / f"{_NAME}.{number}").write_bytes(part)
    whole.unlink()


def _now(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = time.time()
    return member


def main(words: list[str]) -> int:
    if words[:1] == ["flags"]:
        source_flags = [*compile_stage.LLAMA_CPP_FLAGS]
        sys.stdout.write("\n".join(source_flags) + "\n")
        return 0
    if words[:1] == ["manifest"] and len(words) == 4:
        source = json.loads(Path(words[1]).read_text(encoding="utf-8"))
        folder = Path(words[2])
        stock = words[3] == "stock"
        facts = {
            "schema": manifest.SCHEMA,
            "label": source["label"] if not stock else source["stock_label"],
            "series": source["series"] if not stock else source["stock_series"],
            "stock": stock,
            "upstream_commits": {"llama.cpp": source["commit"]},
            "artifacts": [
                {k: v for k, v in row.items() if k != "mtime_ns"} for row in output.describe(folder)
            ],
            "smoke": None,
        }
        manifest.write(facts, folder)
        return 0
    if words[:1] == ["unpack"] and len(words) == 3:
        with tarfile.open(words[1]) as tar:
            tar.extractall(words[2], members=(_now(member) for member in tar), filter="data")
        return 0
    if words[:1] == ["pack"] and len(words) > 3:
        pack(Path(words[1]), Path(words[2]), words[3:])
        return 0
    if words[:1] == ["join"] and len(words) == 3:
        parts = sorted(Path(words[1]).glob(f"{_NAME}.*"))
        data = b"".join(part.read_bytes() for part in parts)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(words[2], filter="data")
        return 0
    if words[:1] == ["model"] and len(words) == 2:
        began = time.monotonic()
        made = models.ensure(models.folder(), models.shape_named(words[1]))
        sys.stdout.write(f"{made.path}: {made.bytes} bytes in {time.monotonic() - began:.1f} s\n")
        return 0
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
