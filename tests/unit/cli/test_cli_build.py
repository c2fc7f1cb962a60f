"""The build from end to end."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_upstream import PATCH, envelope

from kvpatch import cli


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
            "int more(void) { return {{ abi }} > 0 ? 1 + 1 : 0; }\n", encoding="utf-8"
        )
        assert build() == 0
        after = {p.name: p.stat().st_mtime_ns for p in objects.rglob("*.o")}
        assert {name for name in after if after[name] != before.get(name)} == {"more.c.o"}

    def test_stock_and_patched_share_a_workspace_but_not_a_result(
        self, build: Callable[..., int], tmp_path: Path, cache: Path
    ) -> None:
        stock = tmp_path / "stock"
        assert (
            build("--stock", "--out", str(stock)) == 0
        )  # ends with compiling: there is nothing elastic to test
        assert build() == 0
        assert subprocess.run([stock / "bin" / "llama-server"], check=False).returncode == 40
        assert not (stock / "bin" / "libkvcached.so").exists()
        assert len(list((cache / "work").iterdir())) == 1
        assert build("--stock", "--out", str(stock), "--json") == 0

    @pytest.mark.parametrize("stage", ["smoke", "manifest"])
    def test_a_stock_build_is_not_tested(
        self, build: Callable[..., int], capsys: pytest.CaptureFixture[str], stage: str
    ) -> None:
        assert build("--stock", "--until", stage) == 2
        assert "not smoke-tested" in capsys.readouterr().err

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
