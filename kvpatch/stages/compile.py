"""Stage compile: llama-server by itself or the whole of Ollama, staged in upstream's layout, then libkvcached beside
it, and with Ollama the external service.

The flags are upstream's own for the same thing; what kvpatch adds is the source override, the version label, and the
path prefix map that keeps the workspace's path out of the binaries (so that they do not depend on where it lies).
"""

from __future__ import annotations

import os
import re
import shutil
from datetime import datetime
from pathlib import Path

from packaging.version import Version

from kvpatch import library, process, service
from kvpatch.errors import CompileError
from kvpatch.library import LIBRARY
from kvpatch.plan import Plan
from kvpatch.stages import generate, output, worktree
from kvpatch.stages.context import Context, Value

_STEP = re.compile(r"^\[(\d+)/(\d+)\]")

# A server and its libraries, nothing else; the embedded web page would be downloaded, so it is left out.
LLAMA_CPP_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    # Router mode (--models-dir) starts its instances by this.
    "-DLLAMA_SUBPROCESS=ON",
    "-DLLAMA_TOOLS_INSTALL=OFF",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
)
# Backends that are loaded at run time, so that the same binaries start on a machine without a driver. Upstream allows
# that only for code that is not made for the compiling machine, and then has a list of CUDA architectures of its own.
CUDA_FLAGS = (
    "-DGGML_CUDA=ON",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DGGML_NATIVE=OFF",
)
# Every x86 variant of the CPU backend, loaded at run time, as in upstream's release; GPU backends are named beside it.
OLLAMA_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DOLLAMA_MLX_BACKENDS=",
    "-DGGML_CCACHE=OFF",
)
# Debug information would hold the temporary folder that cgo compiles in.
CGO_FLAGS = {"CGO_CFLAGS": "-O2 -g0", "CGO_CXXFLAGS": "-O2 -g0"}


def inputs(context: Context) -> dict[str, object]:
    """What the result depends on besides the trees: flags, tools, and how they are called."""
    plan = context.plan
    return {
        "flags": flags(plan),
        "library": [*library.FLAGS, *library.LINKED],
        "cgo": CGO_FLAGS if plan.ollama else None,
        "service": service.LINKED if plan.ollama and not plan.stock else None,
        "tools": {tool.name: tool.version for tool in plan.tools},
        "version": plan.release.semver if plan.release else None,
    }


def flags(plan: Plan) -> tuple[str, ...]:
    """What the build is configured with, paths of this machine left out."""
    chosen: tuple[str, ...] = LLAMA_CPP_FLAGS
    if plan.ollama is not None:
        # Ollama names its backend by the toolkit's major version, and has a preset for each.
        name = f"cuda_v{Version(plan.cuda.version).major}" if plan.cuda is not None else ""
        chosen = (*OLLAMA_FLAGS, f"-DOLLAMA_LLAMA_BACKENDS={name}")
    elif plan.cuda is not None:
        chosen = (*(flag for flag in chosen if not flag.startswith("-DGGML_NATIVE=")), *CUDA_FLAGS)
    if plan.cuda_arch:
        chosen = (*chosen, f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(plan.cuda_arch)}")
    return chosen


def run(context: Context) -> Value:
    """Compile, and stage the result. Raises CompileError with the last lines of the log."""
    plan = context.plan
    for tree in context.trees().values():
        # The manifest will name the patched commit, so that commit is what must be compiled.
        worktree.refuse_edits(tree)
    shutil.rmtree(context.staging_dir, ignore_errors=True)
    try:
        if plan.ollama is not None:
            _ollama(context)
            target = context.staging_dir / "lib" / "ollama"
        else:
            _llama_cpp(context)
            target = context.staging_dir / "bin"
        if not plan.stock:
            _library(context, target / LIBRARY)
            if plan.ollama is not None:
                _service(context, context.staging_dir / service.PLACE)
    except process.ProcessFailure as failure:
        raise CompileError(
            f"`{failure.argv[0]}` failed while compiling {plan.name}:\n{failure.tail}",
            hint=f"the whole log is {context.log('compile')}",
        ) from failure
    artifacts = output.describe(context.staging_dir)
    if not artifacts:
        raise CompileError(f"the build of {plan.name} left nothing in {context.staging_dir}")
    return {"artifacts": artifacts, "out": str(plan.out)}


def environment(context: Context) -> dict[str, str]:
    """Variables for configuring and building; nested CMake projects take their first values from here too."""
    plan = context.plan
    prefix = f"-ffile-prefix-map={plan.workspace}=."
    env = {
        **tool_environment(plan),
        "CC": str(plan.tool("cc").path),
        "CXX": str(plan.tool("c++").path),
        "CFLAGS": prefix,
        "CXXFLAGS": prefix,
        **CGO_FLAGS,
        # A source of Ollama's embeds __DATE__ and __TIME__.
        "SOURCE_DATE_EPOCH": str(_epoch(plan.llama_cpp_date if plan.release is None else plan.release.date)),
        # A work tree below a user's repository must not be taken for part of it.
        "GIT_CEILING_DIRECTORIES": str(plan.workspace),
    }
    if plan.cuda is not None:
        # Nested builds find the toolkit by these; the compiler says the prefix map to its host compiler.
        env |= {
            "CUDACXX": str(plan.cuda.path),
            "CUDAToolkit_ROOT": str(_toolkit(plan.cuda.path)),
            "CUDAFLAGS": f"-Xcompiler={prefix}",
        }
    if plan.compiler_cache is not None:
        launcher = str(plan.compiler_cache.path)
        env |= {
            "CMAKE_C_COMPILER_LAUNCHER": launcher,
            "CMAKE_CXX_COMPILER_LAUNCHER": launcher,
            **({"CMAKE_CUDA_COMPILER_LAUNCHER": launcher} if plan.cuda is not None else {}),
            "CCACHE_BASEDIR": str(plan.workspace),
            "CCACHE_NOHASHDIR": "1",
        }
    return env


def _toolkit(nvcc: Path) -> Path:
    # A link (update-alternatives, conda) leads to the toolkit; its libraries are beside the real bin folder.
    return nvcc.resolve().parent.parent


def _epoch(day: str) -> int:
    return int(datetime.strptime(f"{day} +0000", "%Y-%m-%d %z").timestamp())


def tool_environment(plan: Plan) -> dict[str, str]:
    """Variables that make a build use the plan's tools, nested builds included."""
    folders = dict.fromkeys(str(tool.path.parent) for tool in plan.tools if tool.origin != "PATH")
    return {
        "PATH": os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]),
        # Ollama configures llama.cpp in a nested build of its own, which would otherwise fall back to make.
        "CMAKE_GENERATOR": "Ninja",
        "GOFLAGS": "-buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOCACHE": str(plan.cache / "go-build"),
    }


def configure_ollama(plan: Plan, build_dir: Path) -> list[str | Path]:
    """The command that configures Ollama's own build of the plan's trees in `build_dir`, llama.cpp prepared."""
    return [
        plan.tool("cmake").path,
        "-S",
        plan.workspace / "ollama",
        "-B",
        build_dir,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={plan.tool('ninja').path}",
        *flags(plan),
        f"-DFETCHCONTENT_SOURCE_DIR_LLAMA_CPP={plan.workspace / 'llama.cpp'}",
        f"-DOLLAMA_GO_OUTPUT={build_dir / 'go' / 'ollama'}",
        f"-DGO_EXECUTABLE={plan.tool('go').path}",
        f"-DOLLAMA_BUILD_PARALLEL={plan.jobs}",
    ]


def build_ollama(plan: Plan, build_dir: Path, prefix: Path) -> list[list[str | Path]]:
    """The commands that build what `configure_ollama` configured and install it in upstream's layout below `prefix`."""
    cmake = plan.tool("cmake").path
    return [
        [cmake, "--build", build_dir, "--parallel", str(plan.jobs)],
        [cmake, "--install", build_dir, "--prefix", prefix, "--component", "ollama-local"],
    ]


def _library(context: Context, target: Path) -> None:
    sources = context.plan.data / "vmm"
    context.detail("compile", LIBRARY)
    context.library_dir.mkdir(parents=True, exist_ok=True)
    built = context.library_dir / LIBRARY
    command = library.compile_command(context.plan.tool("cc").path, sources, built)
    process.run(command, cwd=sources, log=context.log("compile"))
    shutil.copy2(built, target)


def _service(context: Context, target: Path) -> None:
    plan = context.plan
    context.detail("compile", service.SERVICE)
    folder = context.service_dir
    service.write_module(service.module(plan.data, generate.template_context(context)), folder)
    command = service.build_command(plan.tool("go").path, target, plan.series_id)
    process.run(command, cwd=folder, env=environment(context), log=context.log("compile"))


def _llama_cpp(context: Context) -> None:
    plan = context.plan
    cmake = plan.tool("cmake").path
    _cmake(
        context,
        [
            cmake,
            "-S",
            context.llama_cpp_tree,
            "-B",
            context.build_dir,
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={plan.tool('ninja').path}",
            *flags(plan),
            *_rpath(plan),
            *_build_info(context),
        ],
    )
    _cmake(
        context,
        [cmake, "--build", context.build_dir, "--target", "llama-server", "--parallel", str(plan.jobs)],
    )
    target = context.staging_dir / "bin"
    target.mkdir(parents=True)
    for path in sorted((context.build_dir / "bin").iterdir()):
        if path.name == "llama-server" or ".so" in path.name:
            shutil.copy2(path, target / path.name, follow_symlinks=False)


def _ollama(context: Context) -> None:
    plan = context.plan
    assert plan.release is not None
    payload = plan.workspace / "payload"
    shutil.rmtree(payload, ignore_errors=True)
    _cmake(
        context,
        [
            *configure_ollama(plan, context.build_dir),
            *_build_info(context),
            f"-DOLLAMA_VERSION={plan.release.semver}",
            f"-DOLLAMA_PAYLOAD_INSTALL_PREFIX={payload}",
        ],
    )
    for command in build_ollama(plan, context.build_dir, context.staging_dir):
        _cmake(context, command)


def _rpath(plan: Plan) -> list[str]:
    # The toolkit's libraries are not copied: the binaries look for them in it, after their own folder.
    if plan.cuda is None:
        return []
    return [f"-DCMAKE_INSTALL_RPATH=$ORIGIN;{_toolkit(plan.cuda.path) / 'lib64'}"]


def _build_info(context: Context) -> list[str]:
    # Upstream's own commit and number: with git's answer for the patched tree, each changed hook would relink all.
    ref = context.plan.llama_cpp.ref
    number = ref[1:] if re.fullmatch(r"b\d+", ref) else "0"
    return [f"-DLLAMA_BUILD_COMMIT={context.plan.llama_cpp.commit[:9]}", f"-DLLAMA_BUILD_NUMBER={number}"]


def _cmake(context: Context, argv: list[str | Path]) -> None:
    def on_line(line: str) -> None:
        step = _STEP.match(line)
        if step:
            # Not as a detail: the log has the whole line already.
            context.events.stage_detail("compile", f"{step.group(1)} of {step.group(2)}")

    process.run(argv, env=environment(context), log=context.log("compile"), on_line=on_line)


def fresh(context: Context, value: Value) -> bool:
    """Whether the artifacts that an earlier run left in `out` are still there, by size and time."""
    return value["out"] == str(context.plan.out) and output.unchanged(context.plan.out, value["artifacts"])


def library_key(context: Context) -> str:
    """Content of vmm/, which the C library is built from."""
    return library.key(context.plan.data)
