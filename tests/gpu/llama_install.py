"""What llama.sh needs besides kvpatch's own commands:

llama_install.py pack DIR OUT FOLDER...              folders of DIR into OUT/bins.tar.xz.0, .1, ...
llama_install.py join BINS DIR                       and back
llama_install.py model SHAPE                         writes a model where the stages look for it
"""

from __future__ import annotations

import io
import itertools
import lzma
import sys
import tarfile
import time
from pathlib import Path

from kvpatch.bench import models

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


def main(words: list[str]) -> int:
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
