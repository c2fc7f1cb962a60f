"""The values that flow out of this package: what was asked for, what was found, what lies on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["git", "mirror", "path", "archive", "sdist"]
Progress = Callable[[str], None]


def silent(_message: str) -> None:
    """The progress callback of callers that want none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """A project whose source is fetched.

    `name` also names the command-line option that replaces its source.
    """

    name: str
    url: str

    @property
    def option(self) -> str:
        """The command-line option with which a user names another source, e.g. ``--llama-cpp-source``."""
        return f"--{self.name.replace('.', '-')}-source"


OLLAMA = Upstream(name="ollama", url="https://github.com/ollama/ollama.git")
LLAMA_CPP = Upstream(name="llama.cpp", url="https://github.com/ggml-org/llama.cpp.git")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """What a source must be.

    `ref` is the tag, branch, build, version or commit as asked for. `commit` is the upstream commit (all 40
    hex digits, or a prefix of at least 9) or None when unknown; `sha256` that of the archive file or None.
    `date` (YYYY-MM-DD) is the upstream commit's, for sources that cannot tell it themselves. `tree` is the
    name of the commit's root tree (40 hex digits); with it a source without history is shown to hold
    upstream's very files.
    """

    ref: str
    commit: str | None = None
    sha256: str | None = None
    date: str | None = None
    tree: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A source that was found and agrees with its pin.

    `kind`: ``git`` a URL; ``mirror`` a local repository, bare or not; ``path`` a folder without git;
    ``archive`` a file; ``sdist`` llama.cpp inside llama-cpp-python's source distribution. `location` never
    holds credentials. `commit` is upstream's ("" when nothing tells it). `key` identifies the content. `date`
    is the commit's day in UTC (YYYY-MM-DD). `tree` is the pinned root tree, compared by `materialize` for
    sources without history. `verified` says whether the pin named anything that such a source can be compared
    with: the commit of a repository, the sha256 or tree of an archive, the tree of a folder.
    """

    upstream: str
    kind: Kind
    location: str
    ref: str
    commit: str
    key: str
    date: str | None
    verified: bool
    tree: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A git work tree of pristine upstream source.

    `base_commit` is what HEAD points to: upstream's own commit, or a deterministic import commit for sources
    without history. `missing` lists paths left out because the user's mirror lacks their content.
    """

    path: Path
    base_commit: str
    upstream_commit: str
    missing: tuple[str, ...]
    key: str
