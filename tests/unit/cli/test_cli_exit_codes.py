"""Each way to fail has its exit code, its message and what to do next."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_upstream import LLAMA_C, PATCH, envelope, git

from kvpatch import cli, paths


class TestExitCodes:
    @pytest.mark.parametrize(
        ("argv", "code", "expected"),
        [
            (["build", "--no-such-option"], 2, "No such option"),
            (["build", "--backend", "metal"], 2, "cannot be built by this version"),
            (["build", "--cuda-arch", "90"], 2, "no meaning without --backend cuda"),
            (["build", "--backend", "cuda", "--cuda-arch", "sm_90"], 2, "is not an architecture"),
            (["build", "--ollama", "v0.32.15", "--llama-cpp", "b1"], 2, "two different things"),
            (["build", "--jobs", "0"], 2, "at least 1"),
            (["build", "--llama-cpp", "0.3.99"], 2, "llama-cpp-python 0.3.99 is not pinned"),
            (["build", "--llama-cpp", "0.3.99", "--llama-cpp-source", "sdist"], 2, "0.3.99 is not pinned"),
            (["build", "--llama-cpp", "sdist:0.3.24"], 2, "a source is named by --llama-cpp-source"),
            (["build", "--ollama", "v9.9.9"], 4, "v9.9.9 is not a release"),
            (["smoke", "/no/such/folder"], 2, "/no/such/folder"),
            (["verify", "/no/such/folder"], 9, "has no kvpatch.json"),
        ],
    )
    def test_bad_requests(
        self, cache: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, expected: str
    ) -> None:
        assert cli.run([*argv, "--json"]) == code
        seen = envelope(capsys)
        assert seen["status"] == "error"
        assert seen["exit_code"] == code
        assert expected in seen["errors"][0]["message"]
        assert seen["errors"][0]["hint"]
        assert cli.run(argv) == code
        text = capsys.readouterr()
        assert expected in text.err
        assert "next:" in text.err
        assert text.out == ""

    def test_the_way_out_of_a_source_in_the_wrong_place(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for given, version in (
            ("sdist:0.3.24", "0.3.24"),
            ("sdist:/x/llama_cpp_python-0.3.28.tar.gz", "0.3.28"),
        ):
            assert cli.run(["build", "--llama-cpp", given, "--json"]) == 2
            hint = f"--llama-cpp {version}, or --llama-cpp sdist --llama-cpp-source {given}"
            assert envelope(capsys)["errors"][0]["hint"] == hint

    @pytest.mark.parametrize(
        ("argv", "code"),
        [
            (["versions"], 141),
            (["versions", "--json"], 141),
            (["--help"], 141),
            (["build", "--jobs", "0"], 2),
            (["build", "--jobs", "0", "--json"], 2),
        ],
    )
    def test_a_reader_that_has_gone(self, argv: list[str], code: int) -> None:
        read, write = os.pipe()
        os.close(read)
        try:
            both = argv[0] == "build"
            done = subprocess.run(
                [sys.executable, "-m", "kvpatch", *argv],
                stdout=write,
                stderr=write if both else subprocess.PIPE,
                check=False,
            )
        finally:
            os.close(write)
        assert (done.returncode, done.stderr or b"") == (code, b"")

    def test_an_unusable_out_is_told_before_anything_runs(
        self, build: Callable[..., int], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Nobody may make a folder in /proc, root included.
        assert build("--out", "/proc/kvpatch-out") == 2
        assert "cannot be written" in capsys.readouterr().err
        assert not list((cache / "work").glob("*/llama.cpp"))
        foreign = tmp_path / "photos"
        foreign.mkdir()
        (foreign / "cat.jpg").touch()
        assert build("--out", str(foreign), "--plan") == 2
        assert "would be lost" in capsys.readouterr().err

    def test_a_stage_that_does_not_exist_is_told_before_the_source_is_looked_at(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for words in (
            ["--from", "nonsense"],
            ["--until", "nonsense"],
            ["--locked", "--lock", "/no/such/lock"],
        ):
            assert (
                cli.run(["build", "--llama-cpp", "b7", "--llama-cpp-source", "/no/such/source", *words]) == 2
            )
        assert "no such stage" in capsys.readouterr().err

    def test_toolchain(
        self,
        build: Callable[..., int],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = tmp_path / "poor"
        folder.mkdir()
        (folder / "git").symlink_to(str(shutil.which("git")))
        monkeypatch.setenv("PATH", str(folder))
        assert build() == 3
        assert "apt-get install" in capsys.readouterr().err
        # What can be told without any tool is told first.
        assert cli.run(["build", "--ollama", "v9.9.9"]) == 4

    def test_source(
        self, build: Callable[..., int], upstream: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        git(upstream, "tag", "-d", "b7")
        git(upstream, "tag", "b8")
        assert build() == 4
        assert "b7" in capsys.readouterr().err

    def test_patch(
        self, build: Callable[..., int], upstream: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (upstream / "src" / "llama.c").write_text(LLAMA_C.replace("40", "41"), encoding="utf-8")
        git(upstream, "commit", "-qam", "moved on")
        git(upstream, "tag", "-f", "b7")
        assert build("--json") == 5
        error = envelope(capsys)["errors"][0]
        assert error["data"]
        assert not (tmp_path / "out").exists()

    def test_no_patch_for_it(
        self, build: Callable[..., int], data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        patch = data / "patches" / "llama.cpp" / "0001-glue.patch"
        patch.write_text(PATCH.replace(">=2026-01-01", ">=2026-09-01"), encoding="utf-8")
        assert build("--plan", "--json") == 5
        error = envelope(capsys)["errors"][0]
        assert "is for llama.cpp b7 (2026-08-13)" in error["message"]
        assert "--stock" in error["hint"]
        assert build("--plan", "--stock") == 0

    def test_generate(self, build: Callable[..., int], data: Path) -> None:
        (data / "templates" / "llama.cpp" / "more.c.j2").write_text("{{ nothing }}", encoding="utf-8")
        assert build() == 6

    def test_compile_then_goes_on_once_mended(
        self, build: Callable[..., int], data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        template = data / "templates" / "llama.cpp" / "more.c.j2"
        good = template.read_text(encoding="utf-8")
        template.write_text("int more(void) { return nowhere; }\n", encoding="utf-8")
        assert build("--until", "compile") == 7
        text = capsys.readouterr().err
        assert "nowhere" in text
        assert "compile.log" in text
        template.write_text(good, encoding="utf-8")
        assert build("--until", "compile") == 0

    def test_smoke(
        self, build: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # The upstream here is no server at all, which the real smoke tests must notice.
        assert build() == 8
        assert "smoke" in capsys.readouterr().err
        assert (tmp_path / "out" / "bin" / "llama-server").is_file()

    def test_a_bug_is_called_one(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def broken() -> Path:
            raise ZeroDivisionError("oops")

        monkeypatch.setattr(paths, "data_dir", broken)
        assert cli.run(["versions", "--json"]) == 70
        error = envelope(capsys)["errors"][0]
        crash = Path(error["data"]["crash_log"])
        assert "ZeroDivisionError" in crash.read_text(encoding="utf-8")
        crash.unlink()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
    def test_interrupt_leaves_no_child_and_can_be_resumed(
        self,
        build: Callable[..., int],
        data: Path,
        upstream: Path,
        cache: Path,
        tmp_path: Path,
        number: signal.Signals,
    ) -> None:
        # The compiler of this build never ends until it is told to.
        slow = tmp_path / "slow"
        slow.mkdir()
        marker = tmp_path / "compiling"
        for name in ("cc", "c++"):
            (slow / name).write_text(
                f'#!/bin/sh\ncase "$*" in *-dump*|*CMakeC*|*cmTC*) exec /usr/bin/{name} "$@";; esac\n'
                f"echo $$ > {marker}\nexec sleep 60\n",
                encoding="utf-8",
            )
            (slow / name).chmod(0o755)
        script = (
            "import sys; from pathlib import Path; from kvpatch import cli, paths;"
            f"paths.data_dir = lambda: Path({str(data)!r});"
            "sys.exit(cli.run(['compile', '--no-compiler-cache', '--llama-cpp', 'b7',"
            f" '--llama-cpp-source', {str(upstream)!r},"
            f" '--out', {str(tmp_path / 'out')!r}]))"
        )
        env = {**os.environ, "PATH": f"{slow}:{os.environ['PATH']}"}
        child = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 60
            while not (marker.is_file() and marker.read_text(encoding="utf-8").strip()):
                assert time.monotonic() < deadline
                assert child.poll() is None, child.stderr.read() if child.stderr else ""
                time.sleep(0.05)
            child.send_signal(number)
            _, err = child.communicate(timeout=30)
        finally:
            child.kill()
            child.wait()
        assert child.returncode == 130
        assert "goes on from there" in err
        compiler = int(marker.read_text(encoding="utf-8"))
        assert not Path(f"/proc/{compiler}").exists() or "Z" in Path(f"/proc/{compiler}/stat").read_text(
            encoding="utf-8"
        )
        assert build("--until", "compile") == 0
