"""Compiles libkvcached and its C tests and runs them: plain, and under AddressSanitizer and UBSan.

The work is done by vmm/Makefile; what it needs is `make` and a C compiler (`CC`, else `cc`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VMM = ROOT / "vmm"
HEADER = VMM / "include" / "kvcached.h"
SUITES = ("pages", "region", "system", "faults", "ledger", "files", "processes", "threads")
SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined"],
    "tsan": ["-fsanitize=thread"],
}
CASES = [(flavour, suite) for flavour in ("plain", "asan") for suite in SUITES] + [("tsan", "threads")]


def compiler() -> list[str]:
    """The C compiler's command, or skips the test."""
    command = os.environ.get("CC", "cc").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C compiler: {command[0]} is not on PATH (set CC)")
    return command


def call(argv: list[str], timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=timeout
    )


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """Per flavour: the folder with the test programs, or the reason why this machine cannot run it."""
    cc = compiler()
    if shutil.which("make") is None:
        pytest.skip("make is not on PATH")
    build = tmp_path_factory.mktemp("vmm")
    probe = build / "probe.c"
    probe.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    found: dict[str, Path | str] = {}
    targets: list[str] = []
    for flavour, flags in SANITIZERS.items():
        out = build / f"probe-{flavour}"
        done = call([*cc, *flags, "-o", str(out), str(probe)])
        if done.returncode == 0:
            done = call([str(out)])
        if done.returncode != 0:
            assert flavour != "plain", done.stderr
            found[flavour] = (
                f"{' '.join(cc + flags)} makes no running program here: {done.stderr.strip()[-300:]}"
            )
            continue
        found[flavour] = build / flavour / "bin"
        names = [f"test_{suite}" for case, suite in CASES if case == flavour] + ["peer"]
        targets += [str(build / flavour / "bin" / name) for name in names]
    jobs = min(4, os.cpu_count() or 1)
    settings = [f"BUILD={build}", f"CC={' '.join(cc)}", "CFLAGS=-O1 -g -Werror"]
    done = call(["make", "-C", str(VMM), f"-j{jobs}", *settings, *targets])
    assert done.returncode == 0, done.stderr[-8000:]
    return found


@pytest.mark.parametrize(("flavour", "suite"), CASES, ids=[f"{flavour}-{suite}" for flavour, suite in CASES])
def test_suite(programs: dict[str, Path | str], flavour: str, suite: str, tmp_path: Path) -> None:
    where = programs[flavour]
    if isinstance(where, str):
        pytest.skip(where)
    done = subprocess.run(
        [str(where / f"test_{suite}")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert re.search(r"^ok ", done.stdout, re.MULTILINE), done.stdout
    assert list(tmp_path.iterdir()) == [], "scratch files were left behind"


def build_library(out: Path, *flags: str) -> None:
    """Builds the way that needs no Makefile: one line."""
    sources = sorted(str(path) for path in (VMM / "src").glob("*.c"))
    argv = [
        *compiler(),
        "-std=c11",
        "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        "-shared",
        "-Wl,-soname,libkvcached.so",
    ]
    done = call([*argv, *flags, "-o", str(out), *sources, "-lpthread"])
    assert done.returncode == 0, done.stderr


def test_one_line_build_exports_the_header(tmp_path: Path) -> None:
    library = tmp_path / "libkvcached.so"
    build_library(library, "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    text = HEADER.read_text(encoding="utf-8")
    declared = set(re.findall(r"^KVCACHED_API[^;]*?\b(kvcached_\w+)\(", text, re.MULTILINE))
    assert len(declared) >= 25
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH")
    listing = call(["nm", "-D", "--defined-only", str(library)])
    assert {line.split()[-1] for line in listing.stdout.splitlines()} == declared
    imported = call(["nm", "-D", "--undefined-only", str(library)]).stdout
    forbidden = {"exit", "_exit", "abort", "__assert_fail", "printf", "puts", "fprintf", "stderr", "stdout"}
    forbidden |= {"signal", "sigaction"}
    used = {line.split()[-1].split("@")[0] for line in imported.splitlines()}
    assert not used & forbidden, "the library must not end, print in or change its host process"


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_other_compilers_have_no_complaint(cc: str) -> None:
    if shutil.which(cc) is None:
        pytest.skip(f"{cc} is not on PATH")
    warnings = [
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wconversion",
        "-Wshadow",
        "-Wstrict-prototypes",
        "-Werror",
    ]
    for source in sorted((VMM / "src").glob("*.c")):
        done = call([cc, "-std=c11", "-O1", "-fsyntax-only", *warnings, str(source)])
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("standard", ["c++11", "c++20"])
def test_header_is_also_cplusplus(tmp_path: Path, standard: str) -> None:
    cxx = os.environ.get("CXX", "c++").split()
    if shutil.which(cxx[0]) is None:
        pytest.skip(f"no C++ compiler: {cxx[0]} is not on PATH (set CXX)")
    user = tmp_path / "user.cpp"
    user.write_text(
        '#include "kvcached.h"\n'
        "int use(kvcached_ctx_t c, kvcached_stats_t *s, kvcached_slot_t *t, kvcached_options_t *o) {\n"
        "  kvcached_options_init(o);\n"
        "  return kvcached_stats(c, s) + t->slot;\n"
        "}\n",
        encoding="utf-8",
    )
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    done = call([*cxx, f"-std={standard}", *warnings, "-fsyntax-only", f"-I{HEADER.parent}", str(user)])
    assert done.returncode == 0, done.stderr
