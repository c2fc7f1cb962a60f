"""Every architecture that llama.cpp's own tests can make, in four cache configurations: logits elastic and stock.

The driver is in tests/llama/. By hand, with a patched tree and the folder of its libraries:

    cmake -S tests/llama -B BUILD -DLLAMA_CPP_TREE=TREE -DLLAMA_CPP_LIBS=LIBS && cmake --build BUILD
    BUILD/llama-archs compare
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpatch import hashing, smoke, toolchain
from tests.integration.conftest import Kvpatch

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]

SOURCES = Path(__file__).resolve().parents[1] / "llama"
PARTS = 2
CONFIGS = {"unified+fa", "split+fa", "split-fa", "split+q8_0"}
# At least; llama.cpp of August 2026 gives 492 cases of 123 models (dense and expert variants apart), 488 of them equal.
CASES, EQUAL = 464, 430
# Steps that an architecture may not be able to do in stock either; each must have been compared in most cases.
STEPS = ("seq_rm", "state", "seq_cp", "whole state", "long")

Row = dict[str, Any]
Say = Callable[[str], None]


def parse(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Writes a line to the terminal, also where tests pass: what was left out is part of the result."""

    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}")

    return write


@pytest.fixture(scope="module")
def driver(kvpatch: Kvpatch, shared_cache: Path, patched: smoke.Install) -> Path:
    """The program, linked with the patched build's libraries; the tree is the workspace's, patched the same way."""
    libraries = patched.llama_server.parent
    words = (
        "--llama-cpp",
        "sdist",
        "--llama-cpp-source",
        "sdist",
        "--out",
        shared_cache / "demo" / "elastic",
    )
    workspace = kvpatch("generate", *words)["data"]["workspace"]
    cmake = toolchain.ensure(toolchain.CMAKE, shared_cache / "tools").path
    ninja = toolchain.ensure(toolchain.NINJA, shared_cache / "tools").path
    # CMake binds a build folder to its sources: another checkout with the same cache has its own.
    build = shared_cache / "tests" / f"llama-archs-{hashing.of_value(str(SOURCES))[:10]}"
    for argv in (
        [
            *(cmake, "-S", SOURCES, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            *(f"-DLLAMA_CPP_TREE={workspace}/llama.cpp", f"-DLLAMA_CPP_LIBS={libraries}"),
        ],
        [cmake, "--build", build, "--parallel", str(PARTS)],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return build / "llama-archs"


@pytest.fixture(scope="module")
def cases(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """A row a case, from as many processes as there are parts."""
    folder = tmp_path_factory.mktemp("archs")
    tables = [folder / f"{part}.jsonl" for part in range(PARTS)]
    running = []
    try:
        for part, table in enumerate(tables):
            with table.open("wb") as out, (folder / f"{part}.log").open("wb") as log:
                argv = [str(driver), "compare", "--part", f"{part}/{PARTS}"]
                running.append(subprocess.Popen(argv, stdout=out, stderr=log))
        for process in running:
            process.wait()
    finally:
        for process in running:
            process.kill()
            process.wait()
    rows = [row for table in tables for row in parse(table.read_text(encoding="utf-8"))]
    return [row for row in rows if "arch" in row]


def test_all_configurations_of_all_architectures(cases: list[Row]) -> None:
    assert len(cases) >= CASES
    models = {row["arch"] for row in cases}
    assert {(row["arch"], row["config"]) for row in cases} == {(m, c) for m in models for c in CONFIGS}
    assert len(cases) == len(models) * len(CONFIGS)


def test_logits_equal_stock(cases: list[Row], say: Say) -> None:
    counts = Counter(row["status"] for row in cases)
    skipped = [row for row in cases if row["status"] == "skipped"]
    say(
        f"{counts['equal']} of {len(cases)} cases equal, {counts['skipped']} skipped, as stock cannot run them:"
    )
    for row in skipped:
        say(f"  {row['arch']} {row['config']}: {row['why']}")
    assert [row for row in cases if row["status"] not in ("equal", "skipped")] == []
    assert [row for row in skipped if not row["why"]] == []
    assert counts["equal"] >= EQUAL


def test_what_was_compared(cases: list[Row], say: Say) -> None:
    """A step that stock cannot do is left out of a case, which must stay the exception."""
    equal = [row for row in cases if row["status"] == "equal"]
    left_out = Counter((step, why) for row in equal for step, why in row["left_out"].items())
    say("steps left out of cases, as stock ends there:")
    for (step, why), count in sorted(left_out.items()):
        say(f"  {step}, {count} cases: {why}")
    assert min(row["values"] for row in equal) >= 15
    for step in STEPS:
        done = sum(step not in row["left_out"] for row in equal)
        assert done >= 0.8 * len(equal), step


def test_weights_slept_in_every_case(cases: list[Row]) -> None:
    """The driver itself counts as different a case whose weights were not all elastic or did not all sleep."""
    equal = [row for row in cases if row["status"] == "equal"]
    assert all(row["figures"]["slept"] >= row["figures"]["weights slept"] > 0 for row in equal)


@pytest.mark.parametrize(
    ("check", "results"),
    [
        ("memory", 6),
        ("fault", 4),
        ("retry", 1),
        ("shift", 5),
        ("device", 1),
        ("head", 1),
        ("ahead", 1),
        ("control", 1),
    ],
)
def test_check(driver: Path, check: str, results: int) -> None:
    done = subprocess.run([driver, check], capture_output=True, text=True, check=False, timeout=600)
    rows = parse(done.stdout)
    assert len(rows) == results, done.stderr
    assert all(row["ok"] for row in rows), rows
    assert done.returncode == 0


def test_a_page_too_few_makes_a_case_different(driver: Path) -> None:
    """The comparison itself can fail. With flash attention the CPU's kernel skips masked cells, so not all do."""
    env = {**os.environ, "KVCACHED_TEST_UNDERCOMMIT_PAGES": "1"}
    argv = [str(driver), "compare", "--arch", "llama"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=600, env=env)
    statuses = {row["config"]: row["status"] for row in parse(done.stdout) if "arch" in row}
    assert statuses.keys() == CONFIGS
    assert statuses["split-fa"] == "different"
    assert done.returncode == 1
