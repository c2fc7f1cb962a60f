"""Package kvcached: tested as its own module, then with its generated glue and the real library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "go_shim"
TEMPLATES = ROOT / "templates" / "ollama"
HEADER = ROOT / "vmm" / "include" / "kvcached.h"


@pytest.fixture(scope="module")
def go() -> str:
    found = shutil.which("go")
    if found is None:
        pytest.skip("no Go compiler on PATH")
    return found


def run(*argv: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Output of a command that must succeed; modules come through Go's own proxy setting."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_KVCACHED_", "KVCACHED_"))}
    environment |= {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"} | (env or {})
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"
    return done.stdout


def context() -> dict[str, Any]:
    """What the generate stage hands to the templates, read from the same header."""
    header = HEADER.read_text(encoding="utf-8")
    abi = re.search(r"#define KVCACHED_ABI_VERSION (\d+)", header)
    assert abi is not None
    errors = [
        {"name": name, "value": int(value), "text": text}
        for name, value, text in re.findall(r'XX\((\w+), (-?\d+), "([^"]*)"\)', header)
    ]
    assert errors
    return {
        "version": "0.0.0",
        "series": "test-0000000",
        "abi": int(abi[1]),
        "ollama": {"version": "0.0.0", "commit": "0" * 40},
        "llama_cpp": {"commit": "0" * 40, "pin": "b0"},
        "errors": errors,
    }


def render(template: str) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((TEMPLATES / template).read_text(encoding="utf-8")).render(**context())


def test_alone(go: str, tmp_path: Path) -> None:
    """The module by itself, on a copy, so that nothing is written here."""
    copy = tmp_path / "go_shim"
    shutil.copytree(SHIM, copy)
    run(go, "vet", "./...", cwd=copy)
    run(go, "test", "./...", cwd=copy)
    for name in ("go.mod", "go.sum"):
        assert (copy / name).read_bytes() == (SHIM / name).read_bytes(), f"{name}: run `go mod tidy` in go_shim"


def with_glue(tmp_path: Path) -> Path:
    copy = tmp_path / "go_shim"
    shutil.copytree(SHIM, copy)
    shutil.copy(HEADER, copy / "kvcached")
    generated = copy / "kvcached" / "zz_generated_cgo_linux.go"
    generated.write_text(render("zz_generated_cgo_linux.go.j2"), encoding="utf-8")
    return copy


def test_with_the_real_library(go: str, tmp_path: Path) -> None:
    """Generated glue, libkvcached and a child process that maps pages."""
    cc = shutil.which(os.environ.get("CC", "cc"))
    if cc is None:
        pytest.skip("no C compiler on PATH")
    package = with_glue(tmp_path)
    made = tmp_path / "made"
    made.mkdir()
    sources = [str(path) for path in sorted((ROOT / "vmm" / "src").glob("*.c"))]
    shared = [cc, "-std=c11", "-O1", "-fPIC", "-fvisibility=hidden", "-shared"]
    run(*shared, "-o", str(made / "libkvcached.so"), *sources, "-lpthread", cwd=tmp_path)
    other = tmp_path / "other.c"
    other.write_text(
        'unsigned kvcached_abi_version(void) __attribute__((visibility("default")));\n'
        "unsigned kvcached_abi_version(void) { return 99; }\n",
        encoding="utf-8",
    )
    run(*shared, "-o", str(made / "other-abi.so"), str(other), cwd=tmp_path)
    child = Path(__file__).with_name("child.c")
    compile_child = [cc, "-std=gnu11", "-I", str(HEADER.parent), "-o", str(made / "child"), str(child)]
    run(*compile_child, *sources, "-lpthread", cwd=tmp_path)

    made_here = {"KVCACHED_TEST_DIR": str(made)}
    output = run(go, "test", "-v", "-run", "RealLibrary", "./...", cwd=package, env=made_here)
    assert "--- SKIP" not in output, output
    assert output.count("--- PASS: TestRealLibrary") >= 7, output
    run(go, "build", "./...", cwd=package, env={"CGO_ENABLED": "0"})
    gofmt = Path(go).with_name("gofmt")
    if gofmt.exists():
        assert run(str(gofmt), "-l", ".", cwd=package) == ""


@pytest.mark.parametrize("goos", ["windows", "darwin", "linux"])
def test_glue_is_left_out_without_cgo(go: str, goos: str, tmp_path: Path) -> None:
    """A build that cannot use the generated file does not see it: there the package has no library."""
    files = run(
        go, "list", "-f", "{{.GoFiles}} {{.CgoFiles}}", "./kvcached",
        cwd=with_glue(tmp_path), env={"GOOS": goos, "CGO_ENABLED": "1" if goos != "linux" else "0"},
    )  # fmt: skip
    assert "library.go" in files
    assert "zz_generated" not in files


def test_manifest_names_every_file() -> None:
    """A file of the package, or a hook body, that the manifest forgets would be missing from builds."""
    files = tomllib.loads((TEMPLATES / "manifest.toml").read_text(encoding="utf-8"))["file"]
    named = {entry.get("source", f"templates/ollama/{entry.get('template')}") for entry in files}
    package = {p for p in (SHIM / "kvcached").glob("*.go") if not p.name.endswith("_test.go")}
    bodies = {p for p in TEMPLATES.iterdir() if p.suffix in {".go", ".j2"}}
    assert named == {p.relative_to(ROOT).as_posix() for p in package | bodies | {HEADER}}
    assert len({entry["dest"] for entry in files}) == len(files)
    for name in sorted(named):
        assert (ROOT / name).is_file(), name


def test_hook_bodies_import_only_what_ollama_has() -> None:
    """The standard library, Ollama itself and the YAML package of its go.mod."""
    for path in [*(SHIM / "kvcached").glob("*.go"), *TEMPLATES.glob("*.go"), *TEMPLATES.glob("*.go.j2")]:
        block = re.search(r"(?s)^import \(\n(.*?)^\)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in re.findall(r'"([^"]+)"', block[1] if block else ""):
            first = name.split("/")[0]
            assert "." not in first or name.startswith(("gopkg.in/yaml.v3", "github.com/ollama/ollama/")), (path, name)
