"""The programs for the GPU machine, and the benchmark, on a driver made of host memory: they build, run and judge.

What they say of a GPU is for `tests/gpu/run.sh` there; here only that they work, and notice what is wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "run.sh"
STAGES = ("graphs", "fresh", "bench", "soak")


def run(argv: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=280,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the logs of one run of all stages that need no test program, and what it printed."""
    for tool in ("bash", os.environ.get("CC", "cc"), "xargs", "timeout"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH")
    out = tmp_path_factory.mktemp("gpu")
    done = run(["bash", str(SCRIPT), str(out), "build", *STAGES], FAKE="1", WITHOUT_SUITE="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return out, done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_stage_passes(ran: tuple[Path, str], stage: str) -> None:
    out, table = ran
    assert re.search(rf"^{stage} +pass ", table, re.MULTILINE), table
    assert (out / f"{stage}.log").stat().st_size > 0


def test_bench_json_has_every_figure(ran: tuple[Path, str]) -> None:
    data = json.loads((ran[0] / "bench.json").read_text(encoding="utf-8"))
    assert data["schema"] == "kvcached-bench/1"
    assert data["facts"]["backend"] == "cuda"
    figures = {figure["name"]: figure for figure in data["figures"]}
    assert len(figures) == len(data["figures"]), "two figures have one name"
    for name, figure in figures.items():
        sides = [figure[side] for side in ("library", "raw") if figure[side]]
        assert sides, name
        for side in sides:
            assert side["min"] <= side["median"] <= side["max"], name
    for name in (
        "kv_ensure_cold_8_pages_us",
        "kv_ensure_pooled_8_pages_us",
        "kv_release_trim_8_pages_us",
        "weights_sleep_copied_ms",
        "weights_wake_rate_gb_per_s",
        "kv_sleep_ms",
        "together_wake_rate_gb_per_s",
        "claims_tight_2_processes_per_s",
    ):
        assert figures[name]["library"]["median"] > 0, name
    # The bounds that hold on any machine: counts of calls.
    for name in (
        "nothing_grows_device_calls",
        "nothing_grows_driver_calls",
        "kv_ensure_prepared_8_pages_driver_calls",
    ):
        assert figures[name]["bound"]["holds"], figures[name]
    # And the counter counts: a cold step of 8 pages creates and maps each.
    assert figures["kv_ensure_cold_8_pages_driver_calls"]["library"]["min"] >= 16


def test_graphs_sees_a_wrong_word(ran: tuple[Path, str]) -> None:
    """Its own control is part of it; here that a failed check becomes the exit code."""
    build = ran[0] / "build"
    env = {"LD_LIBRARY_PATH": str(build / "fake"), "FAKE_CUDA_MEMORY": str(1 << 30)}
    done = run(
        [str(build / "graphs"), "--cycles", "8", "--size", "4M", "--steps", "32", "--judge-times", "0"], **env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(
        [str(build / "graphs"), "--cycles", "8", "--size", "4M", "--steps", "32", "--spoil", "5"], **env
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cycle 5" in done.stdout
    assert "FAIL graphs" in done.stdout


def test_suite_is_built(tmp_path: Path) -> None:
    """The C suite, by the script's own commands and not by vmm/Makefile; into a folder with a space in its name."""
    out = tmp_path / "of the suite"
    done = run(["bash", str(SCRIPT), str(out), "build", "suite"], FAKE="1", SUITE_ARGS="--suite gate")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^suite +pass .*cuda: \d+ passed, 0 failed, 0 skipped$", done.stdout, re.MULTILINE), (
        done.stdout
    )


def test_what_is_not_built_is_said(tmp_path: Path) -> None:
    done = run(["bash", str(SCRIPT), str(tmp_path), "build", "graphs"], FAKE="1", CC="false")
    assert done.returncode == 1
    assert re.search(r"^graphs +FAIL .*not built: \S+/graphs$", done.stdout, re.MULTILINE), done.stdout


def test_help_and_an_unknown_option(tmp_path: Path) -> None:
    done = run(["bash", str(SCRIPT), "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "run.sh OUT [STAGE...]" in done.stdout
    done = run(["bash", str(SCRIPT), "--nothing"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "--nothing: not an option" in done.stderr


def test_bench_says_before_it_measures(ran: tuple[Path, str], tmp_path: Path) -> None:
    build = ran[0] / "build"
    bench = [str(build / "kvcached-bench"), "--backend", "cuda", "--only", "growth"]
    env = {"LD_LIBRARY_PATH": str(build / "fake"), "FAKE_CUDA_MEMORY": str(1 << 30)}
    missing = str(tmp_path / "missing" / "bench.json")
    done = run([*bench, "--json", missing], **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--json {missing}: No such file" in done.stderr
    done = run([*bench, "--steps", "1,1000"], **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--steps 1000: memory is short" in done.stderr


def test_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = run(["bash", str(SCRIPT), str(tmp_path), "nothing"])
    assert done.returncode == 2
    assert "no such stage" in done.stderr
