"""Package kvcached: tested as its own module, then with its generated glue and the real library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvpatch import generate

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


CONTEXT = {
    "version": "0.0.0",
    "series": "test-0000000",
    "ollama": {"version": "0.0.0", "commit": "0" * 40},
    "llama_cpp": {"commit": "0" * 40, "pin": "b0"},
}


def with_glue(tmp_path: Path) -> Path:
    """The module with the header and the generated file in its package, as an Ollama tree gets them."""
    copy = tmp_path / "go_shim"
    shutil.copytree(SHIM, copy)
    generated = {file.dest: file.content for file in generate.render(ROOT, "ollama", CONTEXT)}
    for name in ("kvcached/kvcached.h", "kvcached/zz_generated_cgo_linux.go"):
        (copy / name).write_bytes(generated[name])
    return copy


def test_alone(go: str, tmp_path: Path) -> None:
    """The module by itself, on a copy, so that nothing is written here."""
    copy = tmp_path / "go_shim"
    shutil.copytree(SHIM, copy)
    run(go, "vet", "./...", cwd=copy)
    run(go, "test", "./...", cwd=copy)
    for name in ("go.mod", "go.sum"):
        assert (copy / name).read_bytes() == (SHIM / name).read_bytes(), "run `go mod tidy` in go_shim"


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
    tests = (package / "kvcached" / "library_test.go").read_text(encoding="utf-8")
    assert output.count("--- PASS: TestRealLibrary") == tests.count("\nfunc TestRealLibrary") > 0, output
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
    """A hook body that the manifest forgets would be missing from builds; tests are not part of one."""
    made = {file.dest for file in generate.render(ROOT, "ollama", CONTEXT)}
    package = {
        f"kvcached/{p.name}" for p in (SHIM / "kvcached").glob("*.go") if not p.name.endswith("_test.go")
    }
    bodies = {p.name.removesuffix(".j2") for p in TEMPLATES.iterdir() if p.suffix in {".go", ".j2"}}
    hooks = {name.replace("_kvcached", "/kvcached") for name in bodies if not name.startswith("zz_")}
    assert made == package | hooks | {"kvcached/kvcached.h", "kvcached/zz_generated_cgo_linux.go"}


def test_hook_bodies_import_only_what_ollama_has() -> None:
    """The standard library, Ollama itself and the YAML package of its go.mod."""
    for path in [*(SHIM / "kvcached").glob("*.go"), *TEMPLATES.glob("*.go"), *TEMPLATES.glob("*.go.j2")]:
        block = re.search(r"(?s)^import \(\n(.*?)^\)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in re.findall(r'"([^"]+)"', block[1] if block else ""):
            known = name.startswith(("gopkg.in/yaml.v3", "github.com/ollama/ollama/"))
            assert known or "." not in name.split("/")[0], (path, name)
