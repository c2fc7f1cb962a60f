"""Where kvpatch keeps things, the data it ships and the cache it fills, and how a file gets there whole."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from kvpatch.errors import KvpatchError

CACHE_VARIABLE = "KVPATCH_CACHE"


def data_dir() -> Path:
    """The folder that holds patches/, templates/, go_shim/ and vmm/.

    In an installed wheel they are packaged as kvpatch/data; in a checkout they stand at its top.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "data", package.parent):
        if (candidate / "patches" / "pins.toml").is_file():
            return candidate
    raise KvpatchError(
        f"this installation of kvpatch is incomplete: no patches/pins.toml beside {package}",
        hint="install it again: pip install --force-reinstall .",
    )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file at once, with its folder: a reader, or a run after a crash, finds it old or new and never torn.

    Text becomes UTF-8, with the bytes of undecodable file names as they were. Raises OSError.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with part_of(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """A name beside `path`, whose folder is there, to write its content to: it becomes `path` at the end, and goes when
    the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each writer: two of them must not write into one half-made file.
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def cache_root(override: Path | None = None) -> Path:
    """The cache: `override` (--cache-dir), else $KVPATCH_CACHE, else the platform's cache folder."""
    if override is not None:
        return override.expanduser().absolute()
    value = os.environ.get(CACHE_VARIABLE)
    if value:
        return Path(value).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("kvpatch", appauthor=False))
