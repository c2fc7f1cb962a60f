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
from kvpatch.cli import bench_ollama, options, tables
from kvpatch.cli.output import Screen
from kvpatch.errors import SmokeError, UsageError
from kvpatch.estimate.sizes import parse_bytes
from kvpatch.smoke.report import CheckFailed

app = typer.Typer(help="Measure against stock, in one run.", no_args_is_help=True)

StockOption = Annotated[Path, typer.Option("--stock", metavar="DIR", help="A build made with --stock.")]
PatchedOption = Annotated[
    Path, typer.Option("--patched", metavar="DIR", help="A build of the same sources made without --stock.")
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
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="SIZE", help="Of the device, for all models together (20GB)."),
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
    name: str,
    text: str,
    full: Any = None,
    short: Any = None,
    run: Callable[[servers.Setup, Any, Any], Report] | None = None,
    ollama: bench_ollama.Level | None = None,
) -> None:
    """Register a benchmark of servers whose plan is a value of `full`'s class; `ollama`: the same of builds that hold
    Ollama."""

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
        budget: BudgetOption = None,
        threads: ThreadsOption = 1,
        short_run: ShortOption = False,
        check: CheckOption = False,
        out: OutOption = None,
        cache_dir: options.CacheOption = None,
        json_output: options.JsonOption = False,
    ) -> None:
        del json_output
        screen: Screen = context.obj
        level = ollama if bench_ollama.holds_ollama(stock, patched) else None
        if level is None and run is None:
            raise UsageError(
                f"bench {name} measures Ollama, which {stock} and {patched} do not hold",
                hint="`kvpatch build --ollama RELEASE`, with --stock and without",
            )
        plans = (full, short) if level is None else (level.full, level.short)
        chosen = plans[short_run]
        if rounds is not None:
            chosen = replace(chosen, **_rounds(name, rounds))
        if starts is not None:
            chosen = replace(chosen, **_starts(name, chosen, starts))
        if cells is not None:
            chosen = replace(chosen, context=cells)
        if budget is not None:
            chosen = replace(chosen, **_budget(name, chosen, budget))
        if chosen.context < chosen.least_context:
            raise UsageError(f"--context {cells}: bench {name} needs {chosen.least_context} cells at least")
        if threads < 1:
            raise UsageError(f"--threads {threads}: at least 1 is needed")
        cache = paths.cache_root(cache_dir)
        work = (out or cache / "bench" / name).absolute()
        work.mkdir(parents=True, exist_ok=True)
        common: dict[str, Any] = {
            "stock": stock,
            "patched": patched,
            "model": model,
            "shape": shape,
            "device": device,
            "threads": threads,
            "work": work,
            "cache": cache_dir,
            "progress": lambda line: screen.note(f"{name}: {line}"),
        }
        try:
            if level is not None:
                report = level.run(bench_ollama.setup(chosen, **common), chosen, screen.note)
            else:
                assert run is not None
                report = run(_setup(**common), chosen, screen.note)
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


def _setup(
    *,
    stock: Path,
    patched: Path,
    model: Path | None,
    shape: str,
    device: str,
    threads: int,
    work: Path,
    cache: Path | None,
    progress: Callable[[str], None],
) -> servers.Setup:
    stock_install, patched_install, facts = servers.installs(stock, patched)
    on = devices.of_name(device)
    if model is not None:
        if not model.is_file():
            raise UsageError(f"--model {model}: there is no such file")
        used = models.Model(path=model.absolute())
    else:
        wanted = models.shape_named(shape)
        progress(f"a model of shape {wanted.name}")
        used = models.ensure(models.folder(cache), wanted)
    return servers.Setup(
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


def _budget(name: str, chosen: Any, budget: str) -> dict[str, int]:
    if not hasattr(chosen, "leave"):
        raise UsageError(f"bench {name} has no --budget: its servers have all of the device")
    return {"leave": parse_bytes(budget, "--budget")}


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
    "Several models in turn on a card that stock fills with one: of llama-server, or of Ollama.",
    switch.Plan(),
    switch.SHORT,
    switch.run,
    bench_ollama.SWITCH,
)
_served(
    "capacity",
    "Ollama: how many models are awake at once, and what an idle one holds.",
    ollama=bench_ollama.CAPACITY,
)
