"""The commands. Each turns its options into one call of the library and its result into something to see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvpatch import __version__, demo, doctor, lock, manifest, paths, pins, pipeline, plan, smoke
from kvpatch.cli import bench, options, tables
from kvpatch.cli import estimate as estimate_command
from kvpatch.cli import pools as pools_commands
from kvpatch.cli import service as service_command
from kvpatch.cli.output import Screen
from kvpatch.errors import SmokeError, UsageError

app = typer.Typer(
    name="kvpatch",
    help="Builds Ollama and llama.cpp with an elastic KV cache: fetch, patch, generate, compile, smoke-test.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kvpatch {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


def _build(
    context: typer.Context,
    request: plan.Request,
    *,
    first: str | None = None,
    last: str | None = None,
    show_plan: bool = False,
    locked: bool = False,
    lock_file: Path | None = None,
) -> None:
    screen: Screen = context.obj
    pipeline.check_names(first, last)
    if locked:
        lock.read(lock_file or lock.DEFAULT)
    decided = plan.make(request, progress=screen.note)
    events = screen.events()
    for warning in decided.warnings:
        events.warning(warning)
    if locked:
        lock.check(decided, lock_file or lock.DEFAULT)
    elif lock_file is not None and not show_plan:
        lock.write(decided, lock_file)
    if show_plan:
        steps = pipeline.steps(decided, events, first=first, last=last)
        data = {
            "plan": decided.to_json(),
            "workspace": str(decided.workspace),
            "out": str(decided.out),
            "stages": [{"stage": s.stage, "key": s.key, "runs": not s.fresh} for s in steps],
        }
        screen.result(data, *tables.plan(decided, steps))
        return
    outcome = pipeline.run(decided, events, first=first, last=last)
    data = {
        "plan": decided.to_json(),
        "workspace": str(decided.workspace),
        "out": str(decided.out),
        "stages": [{"stage": n, "status": s, "seconds": round(t, 3)} for n, s, t in outcome.stages],
        "values": outcome.values,
    }
    screen.result(data, *tables.outcome(decided, outcome))


_TESTED = ("smoke", "manifest")  # stages that a stock build does not have


def _staged(last: str | None, text: str) -> None:
    """Register the command that runs the build up to `last` (None: all of it)."""

    def command(
        context: typer.Context,
        ollama: options.OllamaOption = None,
        llama_cpp: options.LlamaCppOption = None,
        ollama_source: options.OllamaSourceOption = None,
        llama_cpp_source: options.LlamaCppSourceOption = None,
        backend: options.BackendOption = None,
        cuda_arch: options.CudaArchOption = None,
        stock: options.StockOption = False,
        out: options.OutOption = Path("out"),
        jobs: options.JobsOption = None,
        show_plan: options.PlanOption = False,
        first: options.FromOption = None,
        until: options.UntilOption = None,
        locked: options.LockedOption = False,
        lock_file: options.LockOption = None,
        allow_pin_mismatch: options.MismatchOption = False,
        no_compiler_cache: options.NoCompilerCacheOption = False,
        cache_dir: options.CacheOption = None,
        json_output: options.JsonOption = False,
    ) -> None:
        del json_output  # read from the arguments before parsing, so that a usage error is JSON too
        if last is not None and until is not None:
            raise UsageError(
                f"`kvpatch {last}` stops after {last} by itself, so --until {until} has no meaning",
                hint=f"kvpatch build --until {until}",
            )
        goal = until if last is None else last
        if stock and goal in _TESTED:
            raise UsageError(
                f"--until {goal}: a stock build is not smoke-tested, its tests are of the elastic cache",
                hint="kvpatch build --stock",
            )
        request = plan.Request(
            out=out,
            ollama=ollama,
            llama_cpp=llama_cpp,
            ollama_source=ollama_source,
            llama_cpp_source=llama_cpp_source,
            backend=tuple(backend) if backend else ("cpu",),
            cuda_arch=tuple(cuda_arch or ()),
            stock=stock,
            jobs=jobs,
            cache=cache_dir,
            allow_pin_mismatch=allow_pin_mismatch,
            compiler_cache=not no_compiler_cache,
        )
        _build(
            context,
            request,
            first=first,
            last="compile" if stock and goal is None else goal,
            show_plan=show_plan,
            locked=locked,
            lock_file=lock_file,
        )

    app.command(name="build" if last is None else last, help=text)(command)


_staged(None, "Fetch, patch, generate, compile, smoke-test, and write the manifest.")
_staged("fetch", "Only bring the sources into the workspace.")
_staged("apply", "Fetch, and apply the patch series.")
_staged("generate", "Fetch, patch, and write the generated files.")
_staged("compile", "Everything but the smoke tests.")


@app.command(name="smoke", help="Smoke-test the binaries in DIR.")
def _smoke(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `kvpatch build --out` wrote.")
    ],
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Also run every llama-server check with one page too few mapped: it has to fail.",
        ),
    ] = False,
    work_dir: Annotated[
        Path | None, typer.Option("--work-dir", help="Where models and logs go (default: in the cache).")
    ] = None,
    cache_dir: options.CacheOption = None,
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    install = smoke.Install.detect(directory)
    work = work_dir or paths.cache_root(cache_dir) / "smoke"
    report = smoke.run(install, workdir=work, self_test=self_test, progress=screen.note)
    report.require_ok(f"logs are in {work}")
    screen.result({"report": report.to_json()}, *tables.smoke(report))


@app.command(
    name="demo",
    help="Build llama-server stock and elastic from the embedded default and show both side by side.",
)
def _demo(
    context: typer.Context,
    llama_cpp_source: options.LlamaCppSourceOption = "sdist",
    jobs: options.JobsOption = None,
    cache_dir: options.CacheOption = None,
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    cache = paths.cache_root(cache_dir)
    known = pins.load(paths.data_dir() / "patches" / "pins.toml")
    # The same llama.cpp from wherever it is to come.
    from_sdist = llama_cpp_source is None or llama_cpp_source.partition(":")[0] == plan.SDIST

    def build(stock: bool) -> smoke.Install:
        name = "stock" if stock else "elastic"
        screen.note(f"{name} llama-server")
        request = plan.Request(
            out=cache / "demo" / name,
            llama_cpp=plan.SDIST if from_sdist else known.sdist().commit,
            llama_cpp_source=llama_cpp_source,
            stock=stock,
            jobs=jobs,
            cache=cache_dir,
        )
        decided = plan.make(request, progress=screen.note)
        pipeline.run(decided, screen.events(), last="compile")
        return smoke.Install.detect(decided.out)

    report = demo.run(build, workdir=cache / "demo" / "run", progress=screen.note)
    if not report.ok:
        screen.show(*tables.demo(report))
        raise SmokeError(
            "the elastic server does not behave as it must:\n" + "\n".join(report.problems),
            hint=f"logs are in {cache / 'demo' / 'run'}",
            data={"report": report.to_json()},
        )
    screen.result({"report": report.to_json()}, *tables.demo(report))


estimate_command.register(app)
pools_commands.register(app)
service_command.register(app)


@app.command(name="doctor", help="Say what is missing for which target, and the command that installs it.")
def _doctor(
    context: typer.Context, cache_dir: options.CacheOption = None, json_output: options.JsonOption = False
) -> None:
    del json_output
    screen: Screen = context.obj
    findings = doctor.examine(paths.cache_root(cache_dir))
    screen.show(*tables.doctor(findings))
    doctor.require(findings)
    screen.result({"findings": [f.to_json() for f in findings]})


app.add_typer(bench.app, name="bench")


@app.command(name="versions", help="Releases, their pins, and what was verified on them.")
def _versions(
    context: typer.Context,
    llama_cpp: Annotated[
        bool, typer.Option("--llama-cpp", help="List the versions and dates of llama.cpp that are pinned.")
    ] = False,
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    known = pins.load(paths.data_dir() / "patches" / "pins.toml")
    if llama_cpp:
        dates = doctor.llama_cpp(known, paths.data_dir())
        screen.result({"llama_cpp": [row.to_json() for row in dates]}, tables.llama_cpp(dates, known))
        return
    rows = doctor.releases(known, paths.data_dir())
    screen.result({"releases": [row.to_json() for row in rows]}, tables.versions(rows, known))


@app.command(name="verify", help="Hold a build against its manifest.")
def _verify(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `kvpatch build --out` wrote.")
    ],
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    result = manifest.verify(directory)
    table = Table.grid(padding=(0, 2))
    table.add_row("files", f"{result.checked}, each as in the manifest")
    table.add_row("build", str(result.manifest["label"]))
    smoked = {None: "not run on this build", True: "passed", False: "failed"}[result.smoked]
    table.add_row("smoke", smoked)
    screen.result(
        {"checked": result.checked, "smoked": result.smoked, "label": result.manifest["label"]}, table
    )
