"""Where the library comes from, and the example that uses it."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

from kvpatch import library, manifest, paths, process
from kvpatch.errors import CompileError, LibraryError, ToolchainError, UsageError, VerifyError
from kvpatch.runtime import (
    CallError,
    Ledger,
    Library,
    load,
    structures,
)

ROOT = Path(__file__).resolve().parents[3]
HEADER = ROOT / "vmm" / "include" / "kvcached.h"


def shared_object(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    code = path.with_suffix(".c")
    code.write_text(source, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, code], check=True)
    code.unlink()
    return path


def build_of(folder: Path, name: str, content: bytes) -> None:
    """A folder with a manifest that lists one file."""
    target = folder / name
    target.parent.mkdir(parents=True)
    target.write_bytes(content)
    row = {"path": name, "sha256": library.hashing.of_file(target)}
    manifest.write({"schema": manifest.SCHEMA, "artifacts": [row]}, folder)


def test_the_library_of_a_build(tmp_path: Path) -> None:
    build_of(tmp_path / "out", "lib/ollama/libkvcached.so", b"library")
    there = tmp_path / "out" / "lib" / "ollama" / "libkvcached.so"
    assert library.find(tmp_path / "out") == there
    assert library.find(tmp_path / "out" / "kvpatch.json") == there
    assert library.find(there) == there
    there.write_bytes(b"another")
    with pytest.raises(VerifyError, match="is not the library"):
        library.find(tmp_path / "out")


def test_a_build_without_the_library(tmp_path: Path) -> None:
    build_of(tmp_path / "stock", "bin/llama-server", b"server")
    with pytest.raises(UsageError, match="stock build"):
        library.find(tmp_path / "stock")
    with pytest.raises(UsageError, match="stock build"):
        load(str(tmp_path / "stock"))
    (tmp_path / "made").mkdir()
    with pytest.raises(UsageError, match=r"has no libkvcached\.so"):
        library.find(tmp_path / "made")
    (tmp_path / "made" / "libkvcached.so").write_bytes(b"")
    assert library.find(tmp_path / "made").name == "libkvcached.so"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of another library, small, in place of ours."""
    root = tmp_path / "data"
    (root / "vmm" / "src").mkdir(parents=True)
    (root / "vmm" / "include").mkdir()
    shutil.copy(HEADER, root / "vmm" / "include")
    (root / "vmm" / "src" / "one.c").write_text("int one(void) { return 1; }\n", encoding="utf-8")
    monkeypatch.setattr(paths, "data_dir", lambda: root)
    return root


def test_it_is_compiled_once_and_again_when_its_sources_change(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(library.of_cache(tmp_path / "c", progress=said.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(said) == 1
    assert library.of_cache(tmp_path / "c", progress=said.append) == found[0]
    assert sorted(p.name for p in found[0].parent.iterdir() if p.name != "lock") == [
        "compile.log",
        "libkvcached.so",
    ]
    (data / "vmm" / "src" / "two.c").write_text(
        '__attribute__((visibility("default"))) int two(void) { return 2; }\n', encoding="utf-8"
    )
    second = library.of_cache(tmp_path / "c", progress=said.append)
    assert second != found[0]
    assert ctypes.CDLL(str(second)).two() == 2
    assert len(said) == 2


def test_without_a_compiler(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = library.of_cache(tmp_path / "full")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert library.of_cache(tmp_path / "full") == made
    with pytest.raises(ToolchainError, match="none of cc, gcc, clang is on PATH") as caught:
        library.of_cache(tmp_path / "empty")
    assert (caught.value.exit_code, caught.value.hint) == (3, "apt-get install gcc")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
def test_a_traceback_shows_the_hint(
    data: Path, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CallError) as limit:
        ledger.lease("one", "", 2, limit=1)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ToolchainError) as missing:
        load(cache=tmp_path / "empty")
    for error, hint in ((limit.value, "raise the limit"), (missing.value, "apt-get install gcc")):
        assert f"hint: {hint}" in "".join(traceback.format_exception(error))


def test_a_compiler_that_fails(data: Path, tmp_path: Path) -> None:
    (data / "vmm" / "src" / "one.c").write_text("int one(void) { return nonsense; }\n", encoding="utf-8")
    with pytest.raises(CompileError, match="nonsense") as caught:
        library.of_cache(tmp_path / "c")
    assert "compile.log" in (caught.value.hint or "")
    assert not list((tmp_path / "c").rglob("*.so*"))


def test_an_interrupted_compilation_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = process.run

    def interrupted(argv: Any, **kwargs: Any) -> process.Completed:
        if "-o" not in argv:
            return real(argv, **kwargs)
        Path(argv[argv.index("-o") + 1]).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            library.of_cache(tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.so*"))
    assert library.of_cache(tmp_path / "c").is_file()


def test_a_library_of_another_abi(tmp_path: Path) -> None:
    other = shared_object(tmp_path / "libkvcached.so", "unsigned kvcached_abi_version(void) { return 99; }\n")
    with pytest.raises(
        LibraryError,
        match=rf"libkvcached\.so cannot be used: its ABI is 99, this kvpatch needs {structures.ABI}",
    ):
        load(other)


def test_what_is_no_libkvcached(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library", encoding="utf-8")
    with pytest.raises(LibraryError, match=r"text\.so cannot be used"):
        load(text)
    other = shared_object(tmp_path / "other.so", "int nothing;\n")
    with pytest.raises(LibraryError, match="kvcached_abi_version"):
        load(other)
    part = shared_object(
        tmp_path / "part.so", f"unsigned kvcached_abi_version(void) {{ return {structures.ABI}; }}\n"
    )
    with pytest.raises(LibraryError, match="kvcached_version"):
        load(part)


def test_the_example_runs(lib: Library, path: Path, tmp_path: Path) -> None:
    program = tmp_path / "tour"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    where = lib.path.parent
    subprocess.run(
        ["cc", "-std=c11", *warnings, f"-I{HEADER.parent}", "-o", program, ROOT / "vmm" / "examples" / "tour.c",
         f"-L{where}", "-lkvcached", f"-Wl,-rpath,{where}"],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program, "host", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {
        line[:22].strip(): line[22:].split(",") for line in done.stdout.splitlines() if "reserved " in line
    }
    figures = {when: [int(re.sub(r"\D", "", part)) for part in row] for when, row in rows.items()}
    assert figures["reserved"] == [1088, 0, 0, 0, 0]
    assert figures["in use"] == [1088, 80, 0, 0, 0]
    assert figures["asleep"][:4] == [1088, 0, 0, 80]
    assert figures["asleep"][4] >= 80
    assert figures["awake, as before"][:4] == [1088, 80, 0, 0]
    assert figures["released"][:4] == [1088, 80, 16, 0]
    assert figures["trimmed"][:4] == [1088, 64, 0, 0]
    assert "sleep gave back 80 MiB" in done.stdout
    usage = subprocess.run([program, "hip"], capture_output=True, text=True, check=False)
    assert (usage.returncode, "usage" in usage.stderr) == (2, True)
