"""The options that commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OllamaOption = Annotated[
    str | None,
    typer.Option(
        "--ollama",
        metavar="vX.Y.Z",
        help="Release of Ollama to build (the default release when neither is given).",
    ),
]
LlamaCppOption = Annotated[
    str | None,
    typer.Option(
        "--llama-cpp",
        metavar="REF",
        help="Build llama-server alone, from this llama.cpp tag, commit or sdist version.",
    ),
]
OllamaSourceOption = Annotated[
    str | None,
    typer.Option(
        "--ollama-source",
        metavar="PATH|URL",
        help="Git URL, local repository, bare mirror, folder or archive of Ollama.",
    ),
]
LlamaCppSourceOption = Annotated[
    str | None,
    typer.Option(
        "--llama-cpp-source",
        metavar="PATH|URL|sdist",
        help="Git URL, local repository, folder or archive of llama.cpp; `sdist` takes it out of the pinned "
        "llama-cpp-python source distribution.",
    ),
]
BackendOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend", metavar="NAME", help="What to build for: cpu (always built), cuda (with a CUDA toolkit)."
    ),
]
CudaArchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cuda-arch",
        metavar="ARCH",
        help="With --backend cuda: compile for this compute capability (90, 120a, native); may be repeated "
        "(default: upstream's own list).",
    ),
]
StockOption = Annotated[
    bool, typer.Option("--stock", help="Leave everything unpatched: the reference to compare with.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the binaries go.")]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", "-j", help="Compile jobs at once (default: every core).")
]
PlanOption = Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="STAGE", help="Run this stage and all after it, even when nothing changed."
    ),
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
LockedOption = Annotated[bool, typer.Option("--locked", help="Refuse unless the plan equals the lock file.")]
LockOption = Annotated[
    Path | None,
    typer.Option(
        "--lock",
        metavar="FILE",
        help="Write the lock file here (with --locked: read it; default kvpatch.lock).",
    ),
]
MismatchOption = Annotated[
    bool,
    typer.Option(
        "--allow-pin-mismatch", help="Accept a llama.cpp that the release neither pins nor was verified with."
    ),
]
NoCompilerCacheOption = Annotated[
    bool, typer.Option("--no-compiler-cache", help="Do not use ccache or sccache.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", metavar="DIR", help="Where sources and work trees are kept ($KVPATCH_CACHE)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON envelope on standard output.")]
