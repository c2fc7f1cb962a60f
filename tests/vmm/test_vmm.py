"""Compiles libkvcached and its C tests and runs them on every backend: plain, and under the sanitizers.

The work is done by vmm/Makefile and its program vmm_tests; what it needs is `make` and a C compiler (`CC`, else
`cc`). `cuda` is a driver made of host memory here (tests/vmm/fake_cuda.c); on a GPU: `make -C vmm test-cuda`.
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
TESTS = ROOT / "tests" / "vmm"
HEADER = VMM / "include" / "kvcached.h"
SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined"],
    "tsan": ["-fsanitize=thread"],
}
RUNS = [
    ("plain", "host"),
    ("plain", "host-2m"),
    ("plain", "cuda"),
    ("plain", "cuda-async"),
    ("asan", "host"),
    ("asan", "cuda"),
    ("tsan", "host"),
    ("tsan", "cuda"),
]
JOBS = min(4, os.cpu_count() or 1)


def compiler() -> list[str]:
    """The C compiler's command, or skips the test."""
    command = os.environ.get("CC", "cc").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C compiler: {command[0]} is not on PATH (set CC)")
    return command


def call(
    argv: list[str], timeout: float = 300.0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )


class Build:
    """What vmm/Makefile made: `programs` per flavour, or why this machine cannot run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: dict[str, Path | str] = {}

    def program(self, flavour: str) -> Path:
        found = self.programs[flavour]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    def environment(self, backend: str) -> dict[str, str]:
        if not backend.startswith("cuda"):
            return {"KVCACHED_BACKEND": backend}
        return {
            # Work done when it is waited for and no sooner: memory taken from under it shows.
            "FAKE_CUDA_ASYNC": str(int(backend == "cuda-async")),
            "KVCACHED_BACKEND": "cuda",
            "LD_LIBRARY_PATH": str(self.folder / "fake"),
            "KVCACHED_TEST_NVML": str(self.folder / "fake" / "libnvidia-ml.so.1"),
            "FAKE_CUDA_MEMORY": str(8 << 30),
            "FAKE_CUDA_GRANULARITY": str(64 << 10),
            "FAKE_CUDA_STRICT": "1",
        }


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    cc = compiler()
    if shutil.which("make") is None:
        pytest.skip("make is not on PATH")
    made = Build(tmp_path_factory.mktemp("vmm"))
    probe = made.folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    targets = [made.folder / "fake" / "libcuda.so.1"]
    for flavour, flags in SANITIZERS.items():
        out = made.folder / f"probe-{flavour}"
        done = call([*cc, *flags, "-o", str(out), str(probe)])
        if done.returncode == 0:
            done = call([str(out)])
        if done.returncode == 0:
            made.programs[flavour] = made.folder / flavour / "vmm_tests"
            targets.append(made.folder / flavour / "vmm_tests")
            if flavour == "asan":
                targets.append(made.folder / "fuzz_ledger")
        else:
            assert flavour != "plain", done.stderr
            command = " ".join(cc + flags)
            made.programs[flavour] = f"{command} makes no running program here: {done.stderr.strip()[-300:]}"
    settings = [f"BUILD={made.folder}", f"CC={' '.join(cc)}", "CFLAGS=-O1 -g -Werror"]
    done = call(["make", "-C", str(VMM), f"-j{JOBS}", *settings, *map(str, targets)])
    assert done.returncode == 0, done.stderr[-8000:]
    return made


@pytest.mark.parametrize(
    ("flavour", "backend"), RUNS, ids=[f"{flavour}-{backend}" for flavour, backend in RUNS]
)
def test_suites(build: Build, flavour: str, backend: str, tmp_path: Path) -> None:
    program = build.program(flavour)
    env = {**build.environment(backend), "TMPDIR": str(tmp_path)}
    done = call([str(program), "--jobs", str(JOBS), "--timeout", "120"], env=env)
    told = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok "))
    assert done.returncode == 0, f"exit {done.returncode}\n{told[-8000:]}\n{done.stderr[-4000:]}"
    counts = dict(re.findall(r"^(\S+): (\d+ passed, 0 failed), \d+ skipped$", done.stdout, re.MULTILINE))
    assert backend.removesuffix("-async") in counts, done.stdout[-2000:]
    if backend.startswith("cuda"):
        assert "skip " not in told
    assert list(tmp_path.iterdir()) == [], "scratch files were left behind"


def test_the_command_line(build: Build, tmp_path: Path) -> None:
    program = str(build.program("plain"))
    done = call([program, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "--suite NAME" in done.stdout
    for arguments, said in (
        (["--nothing"], "--nothing: not an option"),
        (["--suite"], "--suite: its value is missing"),
        (["--jobs", "x"], "--jobs x: a number from 1"),
        (["--suite", "region", "--test", "none"], "no such test on host: --suite region --test none"),
    ):
        done = call([program, *arguments], env=build.environment("host"))
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    # A library by the driver's name that is no driver: said once.
    (tmp_path / "libcuda.so.1").write_bytes(b"no driver")
    env = {"KVCACHED_BACKEND": "cuda", "LD_LIBRARY_PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = call([program, "--suite", "gate"], env=env)
    assert (done.returncode, done.stdout) == (3, "")
    assert "make test-fake" in done.stderr


def test_damaged_ledgers(build: Build, tmp_path: Path) -> None:
    build.program("asan")
    corpus = sorted(map(str, (TESTS / "corpus").iterdir()))
    assert corpus
    fuzzer = build.folder / "fuzz_ledger"
    listed = call([str(fuzzer), "-help=1"]) if "clang" in " ".join(compiler()) else None
    runs = ["-runs=0"] if listed and "libFuzzer" in listed.stdout + listed.stderr else []
    done = call([str(fuzzer), *runs, *corpus], env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_the_documentation_names_tests_that_exist(build: Build) -> None:
    names: set[str] = set()
    for backend in ("host", "cuda"):  # each has tests that the other has not
        done = call([str(build.program("plain")), "--list"], env=build.environment(backend))
        assert done.returncode == 0, done.stderr
        names |= {line.split()[0] for line in done.stdout.splitlines()}
    suites = {name.partition(".")[0] for name in names}
    text = (ROOT / "docs" / "vmm.md").read_text(encoding="utf-8")
    named = {
        name for name in re.findall(r"`([a-z_]+\.[a-z0-9_]+)`", text) if name.partition(".")[0] in suites
    }
    assert len(named) >= 100
    assert sorted(named - names) == []


def test_ctest(tmp_path: Path) -> None:
    """Configures, builds and runs a part of it: that the rest of the suites pass is shown above."""
    compiler()
    if shutil.which("cmake") is None or shutil.which("ctest") is None:
        pytest.skip("cmake and ctest are not on PATH")
    configured = call(["cmake", "-S", str(TESTS), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Debug"])
    assert configured.returncode == 0, configured.stderr
    done = call(["cmake", "--build", str(tmp_path), f"-j{JOBS}"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    listed = call(["ctest", "--test-dir", str(tmp_path), "-N"]).stdout
    for backend in ("host", "host-2m", "cuda"):
        for suite in ("region", "sleep", "faults", "storm"):
            assert f" {backend}.{suite}\n" in listed, listed
    done = call(
        [
            "ctest",
            "--test-dir",
            str(tmp_path),
            f"-j{JOBS}",
            "-R",
            r"\.(region|pages|backend|driver|strangers)$",
        ]
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "cuda.region" in done.stdout


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
    assert len(declared) >= 45
    six = {"init", "shutdown", "alloc", "free", "available", "set_limit"}
    assert {f"kvcached_{name}" for name in six} <= declared
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH")
    listing = call(["nm", "-D", "--defined-only", str(library)])
    assert {line.split()[-1] for line in listing.stdout.splitlines()} == declared
    imported = call(["nm", "-D", "--undefined-only", str(library)]).stdout
    forbidden = {"exit", "_exit", "abort", "__assert_fail", "printf", "puts", "fprintf", "stderr", "stdout"}
    forbidden |= {"signal", "sigaction"}
    used = {line.split()[-1].split("@")[0] for line in imported.splitlines()}
    assert not used & forbidden, "the library must not end, print in or change its host process"
    assert not {name for name in used if name.startswith("cu")}, "the driver is loaded at run time alone"


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
        "-Wmissing-prototypes",
        "-Werror",
    ]
    sources = sorted(map(str, (VMM / "src").glob("*.c")))
    done = call([cc, "-std=c11", "-O1", "-fsyntax-only", *warnings, *sources])
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
