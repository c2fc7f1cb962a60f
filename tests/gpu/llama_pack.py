"""Packs what llama.sh needs on a machine without network into a folder:

llama_pack.py OUT [--llama-cpp VERSION] [--older VERSION] [--sdists DIR] [--wheel NAME...] [--ollama STOCK PATCHED]

llama.cpp.tar.xz   the stock tree, without what a build does not read; llama.cpp.commit says which it is
older.tar.xz       that of the stage `dates`; older.commit
ollama.tar.xz      for ollama.sh: `ollama` of these two builds of Ollama; then without `older`, which it has no use for
whl/               wheels of what kvpatch needs and the machine has not (pure Python; with --wheel others too)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

# Not read by a build for CPU and CUDA.
_TOP = {
    ".git",
    ".kvpatch",
    ".github",
    ".devops",
    "models",
    "docs",
    "tests",
    "examples",
    "gguf-py",
    "media",
    "benches",
}
_BACKENDS = (
    "vulkan",
    "sycl",
    "metal",
    "opencl",
    "hexagon",
    "webgpu",
    "cann",
    "et",
    "openvino",
    "virtgpu",
    "zdnn",
)
_UNREAD = {f"ggml/src/ggml-{name}" for name in _BACKENDS} | {
    "tools/ui/src",
    "tools/ui/tests",
    "tools/ui/static",
}
_THERE = ("numpy",)  # large, and on every machine with PyTorch


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--llama-cpp", default="0.3.35", metavar="VERSION")
    parser.add_argument("--older", default="0.3.31", metavar="VERSION")
    parser.add_argument("--sdists", type=Path, help="where source distributions already are")
    parser.add_argument("--wheel", action="append", default=[], help="a package more")
    parser.add_argument("--python", default="3.12", help="the machine's Python")
    parser.add_argument("--ollama", nargs=2, type=Path, metavar=("STOCK", "PATCHED"), help="builds of Ollama")
    given = parser.parse_args()
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    trees = {"llama.cpp": given.llama_cpp}
    if given.ollama is None:
        trees["older"] = given.older
    else:
        program = Path(__file__).with_name("ollama_install.py")
        subprocess.run([sys.executable, program, "pack", *given.ollama, out], check=True)
    for name, version in trees.items():
        spec = f"sdist:{version}"
        if given.sdists is not None:
            spec = f"sdist:{given.sdists.absolute()}/llama_cpp_python-{version}.tar.gz"
        stock = _generate(["--llama-cpp", version, "--llama-cpp-source", spec, "--stock"])
        tree = Path(stock["workspace"]) / "llama.cpp"
        _pack(out / f"{name}.tar.xz", tree, sorted(_files(tree)))
        sources = {row["upstream"]: row for row in stock["plan"]["sources"]}
        # By the commit kvpatch knows the tree's date, and so which variants of the patches it takes.
        (out / f"{name}.commit").write_text(sources["llama.cpp"]["commit"] + "\n", encoding="utf-8")
    _wheels(out / "whl", given.wheel, given.python)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    sys.stdout.write(f"{out}: {size / 2**20:.1f} MiB\n")
    return 0


def _generate(words: list[str]) -> dict[str, Any]:
    argv = [sys.executable, "-m", "kvpatch", "generate", *words, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    data: dict[str, Any] = json.loads(done.stdout)["data"]
    return data


def _files(tree: Path) -> list[str]:
    """Every file that a build may read."""
    found = []
    for path in tree.rglob("*"):
        name = path.relative_to(tree).as_posix()
        if path.is_dir() or path.is_symlink() or name.split("/")[0] in _TOP:
            continue
        if not any(name.startswith(folder + "/") for folder in _UNREAD):
            found.append(name)
    return found


def _pack(archive: Path, tree: Path, names: list[str]) -> None:
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for name in names:
            tar.add(tree / name, name)


def _wheels(folder: Path, more: list[str], python: str) -> None:
    """What kvpatch depends on, with what that depends on, as pip resolves it for the machine."""
    shutil.rmtree(folder, ignore_errors=True)
    needed = [
        text
        for text in importlib.metadata.requires("kvpatch") or ()
        if "extra ==" not in text.replace("'", '"')
    ]
    minor = int(python.partition(".")[2])
    needed = [text for text in needed if not ("python_version" in text and minor >= 11)]
    platforms = [
        word
        for name in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
        for word in ("--platform", name)
    ]
    argv = [
        *(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"),
        *("--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms),
        *("-d", str(folder), *needed, *more),
    ]
    subprocess.run(argv, check=True)
    for wheel in folder.iterdir():
        if wheel.name.partition("-")[0].lower() in _THERE:
            wheel.unlink()


if __name__ == "__main__":
    sys.exit(main())
