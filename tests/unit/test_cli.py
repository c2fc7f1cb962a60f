"""The command line from end to end, on a small upstream of our own that CMake builds in a second."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpatch import cli, paths, smoke

CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(upstream C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_subdirectory(src)
add_subdirectory(tools/server)
"""
SRC_CMAKE = """
file(GLOB MODELS "models/*.c")
add_library(llama SHARED llama.c ${MODELS})
"""
SERVER_CMAKE = """
add_executable(llama-server main.c)
target_link_libraries(llama-server llama)
"""
LLAMA_C = """/* upstream */
int answer(void)
{
    int value = 40;
    return value;
}
"""
MAIN_C = "int answer(void);\nint main(void) { return answer(); }\n"
PATCHED_C = """/* upstream */
int more(void);
int answer(void)
{
    int value = 40;
    value += more();
    return value;
}
"""


def blob(text: str) -> str:
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


PATCH = f"""From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Tests <tests@localhost>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH] Call the glue

Kvpatch-Range: >=2026-01-01
Kvpatch-Base: b1
Kvpatch-Why: the answer must be right
Upstream-Status: Inappropriate [test]
Kvpatch-Hook: src/llama.c: value += more();
Kvpatch-Hook: src/llama.c: int more(void);
---
diff --git a/src/llama.c b/src/llama.c
index {blob(LLAMA_C)}..{blob(PATCHED_C)} 100644
--- a/src/llama.c
+++ b/src/llama.c
@@ -1,5 +1,7 @@
 /* upstream */
+int more(void);
 int answer(void)
 {{
     int value = 40;
+    value += more();
     return value;
"""


def git(repo: Path, *words: str) -> None:
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
        **{f"GIT_{who}_{what}": "tests" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        "GIT_AUTHOR_DATE": "2026-08-13T12:00:00Z",
        "GIT_COMMITTER_DATE": "2026-08-13T12:00:00Z",
    }
    subprocess.run(["git", "-C", repo, *words], check=True, env=env, capture_output=True)


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    repo = tmp_path / "upstream"
    for name, text in {
        "CMakeLists.txt": CMAKE,
        "src/CMakeLists.txt": SRC_CMAKE,
        "src/llama.c": LLAMA_C,
        "tools/server/CMakeLists.txt": SERVER_CMAKE,
        "tools/server/main.c": MAIN_C,
    }.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text, encoding="utf-8")
    git(tmp_path, "init", "-q", str(repo))
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "upstream")
    git(repo, "tag", "b7")
    return repo


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """kvpatch's data folder with a series and a template for that upstream, and the real vmm/."""
    real = paths.data_dir()
    root = tmp_path / "data"
    for folder in ("patches/llama.cpp", "patches/ollama", "templates/llama.cpp", "go_shim"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(real / "vmm", root / "vmm")
    shutil.copy(real / "patches" / "pins.toml", root / "patches")
    (root / "patches" / "llama.cpp" / "series").write_text("0001-glue.patch\n", encoding="utf-8")
    (root / "patches" / "llama.cpp" / "0001-glue.patch").write_text(PATCH, encoding="utf-8")
    (root / "templates" / "llama.cpp" / "manifest.toml").write_text(
        '[[file]]\ntemplate = "more.c.j2"\ndest = "src/models/more.c"\n', encoding="utf-8"
    )
    (root / "templates" / "llama.cpp" / "more.c.j2").write_text(
        "int more(void) { return {{ abi }} + 1; }\n", encoding="utf-8"
    )
    monkeypatch.setattr(paths, "data_dir", lambda: root)
    return root


@pytest.fixture
def passing_smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(install: smoke.Install, **_: Any) -> smoke.SmokeReport:
        status = subprocess.run([install.llama_server], check=False).returncode
        check = smoke.Check(name="answer", ok=status == 42, seconds=0.0, detail=f"status {status}")
        return smoke.SmokeReport(root=str(install.root), kind=install.kind, checks=(check,))

    monkeypatch.setattr(smoke, "run", run)


@pytest.fixture
def build(cache: Path, data: Path, upstream: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*more: str, command: str = "build") -> int:
        return cli.run(
            [
                command,
                "--llama-cpp",
                "b7",
                "--llama-cpp-source",
                str(upstream),
                "--out",
                str(tmp_path / "out"),
                *more,
            ]
        )

    return run


def envelope(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


@pytest.mark.usefixtures("passing_smoke")
class TestBuild:
    def test_builds_smokes_verifies_and_then_does_nothing(
        self, build: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert build("--json") == 0
        first = envelope(capsys)
        assert [s["status"] for s in first["data"]["stages"]] == ["done"] * 6
        names = {p.name for p in (tmp_path / "out" / "bin").iterdir()}
        assert names == {"llama-server", "libllama.so", "libkvcached.so"}
        assert cli.run(["verify", str(tmp_path / "out"), "--json"]) == 0
        assert envelope(capsys)["data"] == {
            "checked": 3,
            "smoked": True,
            "label": first_label(first, tmp_path),
        }
        assert build("--json") == 0
        assert {s["status"] for s in envelope(capsys)["data"]["stages"]} == {"fresh"}

    def test_two_cold_builds_give_the_same_bytes(
        self, build: Callable[..., int], tmp_path: Path, cache: Path
    ) -> None:
        def sums() -> dict[str, str]:
            manifest = json.loads((tmp_path / "out" / "kvpatch.json").read_text(encoding="utf-8"))
            return {row["path"]: row["sha256"] for row in manifest["artifacts"]}

        assert build("--no-compiler-cache") == 0
        first = sums()
        shutil.rmtree(cache)
        shutil.rmtree(tmp_path / "out")
        assert build("--no-compiler-cache") == 0
        assert sums() == first

    def test_a_changed_template_compiles_only_what_depends_on_it(
        self, build: Callable[..., int], data: Path, cache: Path
    ) -> None:
        assert build() == 0
        (objects,) = (cache / "work").glob("*/build")
        before = {p.name: p.stat().st_mtime_ns for p in objects.rglob("*.o")}
        (data / "templates" / "llama.cpp" / "more.c.j2").write_text(
            "int more(void) { return {{ abi }} + 1 + 0; }\n", encoding="utf-8"
        )
        assert build() == 0
        after = {p.name: p.stat().st_mtime_ns for p in objects.rglob("*.o")}
        assert {name for name in after if after[name] != before.get(name)} == {"more.c.o"}

    def test_stock_and_patched_share_a_workspace_but_not_a_result(
        self, build: Callable[..., int], tmp_path: Path, cache: Path
    ) -> None:
        stock = tmp_path / "stock"
        assert build("--stock", "--until", "compile", "--out", str(stock)) == 0
        assert build() == 0
        assert subprocess.run([stock / "bin" / "llama-server"], check=False).returncode == 40
        assert not (stock / "bin" / "libkvcached.so").exists()
        assert len(list((cache / "work").iterdir())) == 1
        assert build("--stock", "--until", "compile", "--out", str(stock), "--json") == 0

    def test_a_generated_file_that_goes_away_is_no_longer_compiled(
        self, build: Callable[..., int], tmp_path: Path
    ) -> None:
        assert build() == 0
        assert build("--stock", "--until", "compile", "--out", str(tmp_path / "stock")) == 0
        symbols = subprocess.run(
            ["nm", "-D", tmp_path / "stock" / "bin" / "libllama.so"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert " more" not in symbols

    def test_plan_writes_nothing(
        self, build: Callable[..., int], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert build("--plan", "--json") == 0
        data = envelope(capsys)["data"]
        assert [s["runs"] for s in data["stages"]] == [True] * 6
        assert data["plan"]["sources"][0]["ref"] == "b7"
        assert not (tmp_path / "out").exists()
        assert not (cache / "work").exists()

    def test_single_stages_stop_where_they_say(
        self, build: Callable[..., int], cache: Path, tmp_path: Path
    ) -> None:
        assert build(command="fetch") == 0
        (tree,) = (cache / "work").glob("*/llama.cpp")
        assert "more" not in (tree / "src" / "llama.c").read_text(encoding="utf-8")
        assert build(command="apply") == 0
        assert "value += more();" in (tree / "src" / "llama.c").read_text(encoding="utf-8")
        assert not (tree / "src" / "models").exists()
        assert build(command="generate") == 0
        assert (tree / "src" / "models" / "more.c").is_file()
        assert build(command="compile") == 0
        assert json.loads((tmp_path / "out" / "kvpatch.json").read_text(encoding="utf-8"))["smoke"] is None

    def test_edits_in_the_workspace_are_not_lost(
        self, build: Callable[..., int], cache: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert build(command="generate") == 0
        (file,) = (cache / "work").glob("*/llama.cpp/src/llama.c")
        edited = file.read_text(encoding="utf-8") + "/* mine */\n"
        file.write_text(edited, encoding="utf-8")
        (data / "templates" / "llama.cpp" / "more.c.j2").write_text(
            "int more(void) { return 2; }\n", encoding="utf-8"
        )
        capsys.readouterr()
        assert build("--json", command="generate") == 4
        assert "edited by hand" in envelope(capsys)["errors"][0]["message"]
        assert file.read_text(encoding="utf-8") == edited

    def test_locked_refuses_another_patch(
        self, build: Callable[..., int], tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lock = str(tmp_path / "kvpatch.lock")
        assert build("--lock", lock) == 0
        assert build("--lock", lock, "--locked") == 0
        patch = data / "patches" / "llama.cpp" / "0001-glue.patch"
        patch.write_text(PATCH.replace("must be right", "must be better"), encoding="utf-8")
        capsys.readouterr()
        assert build("--lock", lock, "--locked", "--json") == 9
        assert any("0001-glue.patch" in line for line in envelope(capsys)["errors"][0]["data"]["differences"])


def first_label(first: dict[str, Any], tmp_path: Path) -> str:
    manifest = json.loads((tmp_path / "out" / "kvpatch.json").read_text(encoding="utf-8"))
    assert first["data"]["plan"]["series"] in manifest["label"]
    return str(manifest["label"])


class TestExitCodes:
    @pytest.mark.parametrize(
        ("argv", "code", "expected"),
        [
            (["build", "--no-such-option"], 2, "No such option"),
            (["build", "--backend", "cuda"], 2, "cannot be built by this version"),
            (["build", "--ollama", "v0.32.15", "--llama-cpp", "b1"], 2, "two different things"),
            (["build", "--jobs", "0"], 2, "at least 1"),
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


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvpatch ")
    assert cli.run(["build", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--ollama", "--llama-cpp-source", "--plan", "--from", "--until", "--json", "--locked"):
        assert option in text


def test_versions_lists_every_release_with_its_pin(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["versions", "--json"]) == 0
    rows = envelope(capsys)["data"]["releases"]
    default = next(row for row in rows if row["version"] == "v0.32.15")
    assert default["llama_cpp"] == "b10488"
    assert default["verified_with"] == ["4df29be4f"]
    assert default["patches"] >= 1


def test_doctor_names_what_is_missing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["doctor"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.run(["doctor", "--json"]) == 3
    error = envelope(capsys)["errors"][0]
    assert "git" in error["message"]
    assert "apt-get install" in error["hint"]
    status = {f["name"].split()[0]: f["status"] for f in error["data"]["findings"]}
    assert status["cmake"] == "index"
    assert status["git"] == "missing"


def test_a_machine_without_git_is_told_so(cache: Path, tmp_path: Path) -> None:
    # In a process of its own: GitPython looks for git when it is first imported.
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "kvpatch", "doctor", "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "apt-get install git" in json.loads(done.stdout)["errors"][0]["hint"]
