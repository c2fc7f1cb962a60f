"""Which options a llama-server knows. Their names changed over the months that the patches cover."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from kvpatch import process

_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")
_HELP_SECONDS = 60.0


@functools.cache
def known_options(llama_server: Path) -> frozenset[str]:
    """Every option that `llama-server --help` names. Raises ProcessFailure when it cannot be run."""
    text = process.run([llama_server, "--help"], timeout=_HELP_SECONDS).stdout
    return frozenset(_OPTION.findall(text))


def if_known(llama_server: Path, *words: str) -> tuple[str, ...]:
    """`words` (an option and its values) where the server knows the option, else none."""
    return words if words[0] in known_options(llama_server) else ()


def without_memory_map(llama_server: Path) -> tuple[str, ...]:
    """What makes a server read its weights into memory of its own, which can sleep, in place of mapping the file."""
    return if_known(llama_server, "--load-mode", "none") or ("--no-mmap",)


def on_cpu(llama_server: Path) -> tuple[str, ...]:
    """What keeps a server away from a GPU that its build could use, and its log free of prefixes."""
    return (
        *("--device", "none"),
        *if_known(llama_server, "--no-log-prefix"),
        *if_known(llama_server, "--no-log-timestamps"),
    )
