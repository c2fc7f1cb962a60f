"""What a build leaves behind: which binaries are in a folder, and where."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpatch.errors import UsageError

Kind = Literal["llama.cpp", "ollama"]
LIBRARY = "libkvcached.so"


@dataclass(frozen=True, kw_only=True, slots=True)
class Install:
    """An installed tree. Layouts: `ollama`: bin/ollama and lib/ollama/llama-server; `llama.cpp`:
    bin/llama-server. Shared libraries lie beside llama-server."""

    root: Path
    kind: Kind
    llama_server: Path
    ollama: Path | None

    @property
    def library(self) -> Path:
        """Where libkvcached is (or, in a stock install, would be)."""
        return self.llama_server.parent / LIBRARY

    @property
    def patched(self) -> bool:
        """Whether the elastic cache's library is there; a stock install has none."""
        return self.library.is_file()

    @classmethod
    def detect(cls, root: Path) -> Install:
        """The install in `root`. Raises UsageError when there is none, or when one is incomplete."""
        root = root.absolute()
        if not os.access(root, os.R_OK | os.X_OK) or not root.is_dir():
            raise UsageError(
                f"{root} is not a folder that can be read",
                hint="name the folder that `kvpatch build --out DIR` wrote",
            )
        ollama = root / "bin" / "ollama"
        nested = root / "lib" / "ollama" / "llama-server"
        plain = root / "bin" / "llama-server"
        if ollama.is_file() or nested.is_file():
            for path in (ollama, nested):
                _require_executable(path, root)
            return cls(root=root, kind="ollama", llama_server=nested, ollama=ollama)
        if plain.is_file():
            _require_executable(plain, root)
            return cls(root=root, kind="llama.cpp", llama_server=plain, ollama=None)
        raise UsageError(
            f"no install in {root}: neither bin/ollama with lib/ollama/llama-server nor bin/llama-server",
            hint="`kvpatch build --out DIR` writes one",
        )


def _require_executable(path: Path, root: Path) -> None:
    relative = path.relative_to(root)
    if not path.is_file():
        raise UsageError(f"the install in {root} is incomplete: {relative} is missing", hint="build it again")
    if not os.access(path, os.X_OK):
        raise UsageError(f"{relative} in {root} is not executable", hint=f"chmod +x {path}")
