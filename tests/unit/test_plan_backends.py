"""What a build is configured with for each backend, and which source distribution is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvpatch import paths, pins, plan
from kvpatch.errors import SourceError, UsageError
from kvpatch.events import Silent
from kvpatch.sources import Store
from kvpatch.stages import compile as compile_stage
from kvpatch.stages.context import Context
from kvpatch.toolchain import Tool

MakePlan = Callable[..., plan.Plan]


@pytest.fixture(scope="module")
def known() -> pins.Pins:
    return pins.load(paths.data_dir() / "patches" / "pins.toml")


@pytest.fixture
def cuda(make_plan: MakePlan, tmp_path: Path) -> MakePlan:
    """Makes plans with the CUDA backend; the compiler is a link into a toolkit, as distributions install it."""
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    (tmp_path / "toolkit" / "bin" / "nvcc").touch()
    (tmp_path / "nvcc").symlink_to(tmp_path / "toolkit" / "bin" / "nvcc")

    def make(version: str = "12.8", **changes: object) -> plan.Plan:
        tools = tuple(
            Tool(name=name, path=path, version=v, origin="PATH")
            for name, path, v in (
                ("cc", Path("/usr/bin/cc"), "12.0"),
                ("c++", Path("/usr/bin/c++"), "12.0"),
                ("nvcc", tmp_path / "nvcc", version),
            )
        )
        return make_plan(**{"tools": tools, "backend": ("cpu", "cuda"), **changes})

    return make


def test_a_cpu_build_knows_nothing_of_cuda(make_plan: MakePlan) -> None:
    built = make_plan()
    assert built.cuda is None
    assert compile_stage.flags(built) == compile_stage.LLAMA_CPP_FLAGS
    assert "cuda_arch" not in built.to_json()


def test_a_cuda_build_starts_without_a_driver(cuda: MakePlan) -> None:
    flags = compile_stage.flags(cuda())
    assert {"-DGGML_CUDA=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_NATIVE=OFF"} <= set(flags)
    assert "-DGGML_NATIVE=ON" not in flags
    assert not [flag for flag in flags if "ARCHITECTURES" in flag]


def test_named_architectures_are_all_that_is_compiled(cuda: MakePlan) -> None:
    built = cuda(cuda_arch=("90", "120a"))
    assert "-DCMAKE_CUDA_ARCHITECTURES=90;120a" in compile_stage.flags(built)
    assert built.to_json()["cuda_arch"] == ["90", "120a"]
    assert built.workspace == cuda().workspace


@pytest.mark.parametrize(("version", "name"), [("12.8", "cuda_v12"), ("13.0", "cuda_v13")])
def test_ollama_names_its_backend_by_the_toolkit(cuda: MakePlan, version: str, name: str) -> None:
    ollama = cuda().llama_cpp
    assert f"-DOLLAMA_LLAMA_BACKENDS={name}" in compile_stage.flags(cuda(version, ollama=ollama))
    assert "-DOLLAMA_LLAMA_BACKENDS=" in compile_stage.flags(cuda(ollama=ollama, backend=("cpu",)))


def test_nested_builds_find_the_toolkit_and_the_compiler_cache(cuda: MakePlan, tmp_path: Path) -> None:
    cache = Tool(name="compiler cache", path=Path("/usr/bin/ccache"), version="4", origin="PATH")
    env = compile_stage.environment(Context(plan=cuda(compiler_cache=cache), events=Silent()))
    assert env["CUDACXX"] == str(tmp_path / "nvcc")
    assert env["CUDAToolkit_ROOT"] == str(tmp_path / "toolkit")
    assert env["CMAKE_CUDA_COMPILER_LAUNCHER"] == "/usr/bin/ccache"
    plain = compile_stage.environment(
        Context(plan=cuda(backend=("cpu",), compiler_cache=cache), events=Silent())
    )
    assert not {"CUDACXX", "CMAKE_CUDA_COMPILER_LAUNCHER"} & set(plain)


def test_an_architecture_needs_its_backend_and_its_form(tmp_path: Path) -> None:
    for arch in ("90", "90a", "120f-virtual", "86-real", "native", "all-major"):
        plan._check(plan.Request(out=tmp_path / "out", backend=("cuda",), cuda_arch=(arch,)))
    for arch in ("sm_90", "9.0", "90;86", ""):
        with pytest.raises(UsageError, match="is not an architecture"):
            plan._check(plan.Request(out=tmp_path / "out", backend=("cuda",), cuda_arch=(arch,)))
    with pytest.raises(UsageError, match="no meaning without"):
        plan._check(plan.Request(out=tmp_path / "out", cuda_arch=("90",)))


@pytest.mark.parametrize(
    ("named", "version"),
    [
        ("", "0.3.35"),
        ("0.3.24", "0.3.24"),
        ("/some/where/llama_cpp_python-0.3.28.tar.gz", "0.3.28"),
        ("llama_cpp_python-0.3.20.tar.gz", "0.3.20"),
        ("/some/where/sources.tar.gz", "0.3.35"),
    ],
)
def test_which_source_distribution_is_meant(known: pins.Pins, named: str, version: str) -> None:
    assert plan._sdist(known, None, [], named).version == version


def test_a_commit_finds_its_source_distribution(known: pins.Pins) -> None:
    held = [sdist for sdist in known.sdists if sdist.commit == "af6528e6d"]
    assert plan._sdist(known, None, held, "").version == "0.3.24"
    assert plan._sdist(known, known.release("v0.32.15"), [], "").commit == "4df29be4f"


def test_a_source_distribution_that_holds_another_commit_is_refused(known: pins.Pins, tmp_path: Path) -> None:
    request = plan.Request(out=tmp_path, llama_cpp="0.3.24", llama_cpp_source="sdist:0.3.28")
    with pytest.raises(SourceError, match=r"0\.3\.24 is not what the source distribution 0\.3\.28 holds"):
        plan._llama_cpp(known, Store(tmp_path / "sources"), request, None, "0.3.24", lambda _: None)
