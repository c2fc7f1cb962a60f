"""`kvpatch bench ...`: measurements against stock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpatch import bench, paths, plan
from kvpatch.bench import device as devices
from kvpatch.bench import idle, models, overhead, plot, servers, switch
from kvpatch.bench.figures import Report
from kvpatch.cli import options, tables
from kvpatch.cli.output import Screen
from kvpatch.errors import SmokeError, UsageError
from kvpatch.smoke.report import CheckFailed

app = typer.Typer(help="Measure against stock, in one run.", no_args_is_help=True)

StockOption = Annotated[Path, typer.Option("--stock", metavar="DIR", help="A build made with --stock.")]
PatchedOption = Annotated[
    Path, typer.Option("--patched", metavar="DIR", help="A build of the same llama.cpp made without --stock.")
]
ModelOption = Annotated[Path | None, typer.Option("--model", metavar="GGUF", help="Measure with this model.")]
ShapeOption = Annotated[
    str,
    typer.Option(
        "--shape", help=f"Without --model: random weights of this shape ({', '.join(models.SHAPES)})."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model is: cpu or cuda.")]
RoundsOption = Annotated[
    int | None,
    typer.Option("--rounds", help="Measurements of each figure and side (default: by the benchmark)."),
]
StartsOption = Annotated[
    int | None,
    typer.Option("--starts", help="Times that the servers are started anew (default: by the benchmark)."),
]
ShortOption = Annotated[
    bool, typer.Option("--short", help="Everything once and small: shows that it runs, not how fast.")
]
CheckOption = Annotated[bool, typer.Option("--check", help="Exit 9 when a bound is missed.")]
ContextOption = Annotated[
    int | None, typer.Option("--context", help="Cells reserved (default: by the benchmark).")
]
ThreadsOption = Annotated[int, typer.Option("--threads", help="Of each server, on a CPU.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Figures as JSON, a plot, and the servers' logs.")
]


@app.command(name="build", help="Cold build: Ollama's own against kvpatch's, alternating.")
def _build(
    context: typer.Context,
    ollama: options.OllamaOption = None,
    ollama_source: options.OllamaSourceOption = None,
    llama_cpp_source: options.LlamaCppSourceOption = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Builds of each side.")] = 2,
    jobs: options.JobsOption = None,
    work_dir: Annotated[
        Path | None, typer.Option("--work-dir", help="Where both are built (default: in the cache).")
    ] = None,
    cache_dir: options.CacheOption = None,
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    work = (work_dir or paths.cache_root(cache_dir) / "bench").absolute()
    request = plan.Request(
        out=work / "out",
        ollama=ollama,
        ollama_source=ollama_source,
        llama_cpp_source=llama_cpp_source,
        jobs=jobs,
        cache=cache_dir,
    )
    decided = plan.make(request, progress=screen.note)
    result = bench.cold_build(decided, rounds=rounds, workdir=work, progress=screen.note)
    screen.result({"result": result.to_json()}, *tables.cold_build(result))


def _served(
    name: str, text: str, full: Any, short: Any, run: Callable[[servers.Setup, Any, Any], Report]
) -> None:
    """Register a benchmark of servers whose plan is a value of `full`'s class."""

    def command(
        context: typer.Context,
        stock: StockOption,
        patched: PatchedOption,
        model: ModelOption = None,
        shape: ShapeOption = "8b",
        device: DeviceOption = "cuda",
        rounds: RoundsOption = None,
        starts: StartsOption = None,
        cells: ContextOption = None,
        threads: ThreadsOption = 1,
        short_run: ShortOption = False,
        check: CheckOption = False,
        out: OutOption = None,
        cache_dir: options.CacheOption = None,
        json_output: options.JsonOption = False,
    ) -> None:
        del json_output
        screen: Screen = context.obj
        chosen = short if short_run else full
        if rounds is not None:
            chosen = replace(chosen, **_rounds(name, rounds))
        if starts is not None:
            chosen = replace(chosen, **_starts(name, chosen, starts))
        if cells is not None:
            chosen = replace(chosen, context=cells)
        if chosen.context < chosen.least_context:
            raise UsageError(f"--context {cells}: bench {name} needs {chosen.least_context} cells at least")
        if threads < 1:
            raise UsageError(f"--threads {threads}: at least 1 is needed")
        cache = paths.cache_root(cache_dir)
        work = (out or cache / "bench" / name).absolute()
        work.mkdir(parents=True, exist_ok=True)
        stock_install, patched_install, facts = servers.installs(stock, patched)
        on = devices.of_name(device)
        if model is not None:
            if not model.is_file():
                raise UsageError(f"--model {model}: there is no such file")
            used = models.Model(path=model.absolute())
        else:
            wanted = models.shape_named(shape)
            screen.note(f"{name}: a model of shape {wanted.name}")
            used = models.ensure(models.folder(cache_dir), wanted)
        setup = servers.Setup(
            stock=stock_install,
            patched=patched_install,
            model=used,
            device=on,
            work=work,
            threads=threads,
            facts={
                "builds": facts,
                "model": used.path.stem,
                "model_bytes": used.bytes,
                "on": on.name,
                **on.facts(),
            },
        )
        try:
            report = run(setup, chosen, screen.note)
        except CheckFailed as failure:
            logs = "".join(f"\nlast lines of {who}:\n{lines}" for who, lines in failure.logs.items())
            raise SmokeError(f"bench {name}: {failure.detail}{logs}", hint=f"logs are in {work}") from failure
        plot.draw(report, work)
        report.write(work)
        screen.show(*tables.bench(report))
        if check:
            report.require()
        screen.result({"report": report.to_json(), "out": str(work)})

    app.command(name=name, help=text)(command)


def _rounds(name: str, rounds: int) -> dict[str, int]:
    if rounds < 1:
        raise UsageError(f"--rounds {rounds}: at least 1 is needed")
    return {"sleeps": rounds} if name == "idle" else {"rounds": rounds}


def _starts(name: str, chosen: Any, starts: int) -> dict[str, int]:
    if not hasattr(chosen, "starts"):
        raise UsageError(f"bench {name} has no --starts: each of its servers is started once")
    if starts < 1:
        raise UsageError(f"--starts {starts}: at least 1 is needed")
    return {"starts": starts}


_served(
    "overhead",
    "Decode, prefill and single steps: patched against stock.",
    overhead.Plan(),
    overhead.SHORT,
    overhead.run,
)
_served(
    "idle",
    "What an unused model holds, and how long it takes to wake.",
    idle.Plan(),
    idle.SHORT,
    idle.run,
)
_served(
    "switch",
    "Several models on a card that stock fills with one.",
    switch.Plan(),
    switch.SHORT,
    switch.run,
)
