"""`kvpatch estimate`: its options, and the estimate as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvpatch import estimate as estimates
from kvpatch.cli import options
from kvpatch.cli.output import Screen
from kvpatch.estimate.budget import Share
from kvpatch.estimate.sizes import KV_TYPES, format_bytes, parse_bytes

HELP = """Exact memory of a model, from its GGUF file alone: weights, KV cache, what an elastic build maps.

Sizes are what llama.cpp allocates with every layer on one device. Defaults are llama-server's own: the trained
context, four slots in one unified stream (with --parallel: a stream a slot), f16, flash attention.
"""


def command(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.gguf", help="The model; of a split one, the first part.")
    ],
    num_ctx: Annotated[
        int,
        typer.Option(
            "--num-ctx",
            metavar="N",
            help="Cells of all slots together, llama-server's -c; Ollama passes num_ctx times its parallel requests. "
            "0: the trained context.",
        ),
    ] = 0,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", metavar="N", help="Slots, llama-server's -np. Default: 4, unified."),
    ] = None,
    kv_type: Annotated[
        str, typer.Option("--kv-type", metavar="T", help=f"Type of the KV cache: {', '.join(KV_TYPES)}.")
    ] = "f16",
    kv_type_v: Annotated[
        str | None, typer.Option("--kv-type-v", metavar="T", help="Type of V where it is another one.")
    ] = None,
    unified: Annotated[
        bool | None,
        typer.Option("--unified/--split", help="One stream for all slots, or one each. Default: see above."),
    ] = None,
    flash_attn: Annotated[
        bool,
        typer.Option(
            "--flash-attn/--no-flash-attn", help="Without it V is transposed and cannot grow by pages."
        ),
    ] = True,
    swa_full: Annotated[
        bool, typer.Option("--swa-full", help="Sliding-window layers keep the full context.")
    ] = False,
    batch: Annotated[int, typer.Option("--batch-size", metavar="N", help="llama-server's -b.")] = 2048,
    ubatch: Annotated[
        int,
        typer.Option(
            "--ubatch-size", metavar="N", help="llama-server's -ub: part of a sliding window's ring."
        ),
    ] = 512,
    device: Annotated[
        str, typer.Option("--device", metavar="cuda|cpu", help="Where all layers are.")
    ] = "cuda",
    page_size: Annotated[
        str | None,
        typer.Option(
            "--page-size",
            metavar="SIZE",
            help="Pages of an elastic build. Default: 2MiB on cuda, 4KiB on cpu.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            help="Tokens in one slot, for what is mapped. Default: 1000, or the slot.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE", help="How many such models fit: 20GB, 19.5GiB ..."),
    ] = None,
    context_size: Annotated[
        str | None,
        typer.Option(
            "--context-size",
            metavar="SIZE",
            help="What each process takes for itself on the device. Default: 527MiB on cuda, an empty context on an "
            "H200.",
        ),
    ] = None,
    compute_size: Annotated[
        str,
        typer.Option(
            "--compute-size",
            metavar="SIZE",
            help="Compute buffers of each model: not estimated, add them here.",
        ),
    ] = "0",
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    settings = estimates.Settings(
        context=num_ctx,
        parallel=4 if parallel is None else parallel,
        unified=parallel is None if unified is None else unified,
        type_k=kv_type,
        type_v=kv_type_v or kv_type,
        flash_attn=flash_attn,
        batch=batch,
        ubatch=ubatch,
        swa_full=swa_full,
    )
    result = estimates.estimate(
        model,
        settings,
        device=device,
        page=None if page_size is None else parse_bytes(page_size, "--page-size"),
        tokens=tokens,
        budget=None if budget is None else parse_bytes(budget, "--budget"),
        context=None if context_size is None else parse_bytes(context_size, "--context-size"),
        compute=parse_bytes(compute_size, "--compute-size"),
    )
    for warning in result.caches.warnings:
        screen.note(f"warning: {warning}")
    screen.result({"estimate": result.to_json()}, *tables(result))


def register(app: typer.Typer) -> None:
    app.command(name="estimate", help=HELP)(command)


def tables(result: estimates.Estimate) -> Sequence[RenderableType]:
    """The model, its weights, its caches, its pages, and how many fit."""
    return [_facts(result), Text(""), _weights(result), Text(""), *_caches(result), *_budget(result)]


def _size(count: int) -> str:
    return f"{count:,} ({format_bytes(count)})" if count >= 1024 else f"{count:,}"


def _facts(result: estimates.Estimate) -> Table:
    model, caches = result.model, result.caches
    settings = caches.settings
    table = Table.grid(padding=(0, 2))
    drafting = f" and {model.nextn} for drafting" if model.nextn else ""
    table.add_row(
        "model",
        f"{model.arch}, {model.n_layer} layers{drafting}, trained on {model.context_trained:,} tokens",
    )
    parts = f" in {len(result.gguf.paths)} parts" if len(result.gguf.paths) > 1 else ""
    table.add_row("file", f"{_size(result.weights.file_bytes)} bytes{parts}")
    streams = "one unified stream" if settings.unified else "a stream each"
    table.add_row(
        "context",
        f"{caches.context:,} cells, {settings.parallel} slots in {streams}, up to {caches.context_slot:,} cells a slot",
    )
    kinds = (
        settings.type_k if settings.type_k == settings.type_v else f"{settings.type_k} and {settings.type_v}"
    )
    table.add_row(
        "cache type", kinds + ("" if settings.flash_attn else ", V transposed (no flash attention)")
    )
    return table


def _weights(result: estimates.Estimate) -> Table:
    weights = result.weights
    table = Table("weights", "tensors", "bytes", box=None, pad_edge=False)
    table.add_row(f"on {weights.device.device}", str(weights.device.tensors), _size(weights.device.nbytes))
    if weights.tied_bytes:
        table.add_row("  of these, the embeddings again, as output matrix", "1", _size(weights.tied_bytes))
    if weights.host is not None:
        table.add_row(
            "on the CPU (embeddings are looked up there)",
            str(weights.host.tensors),
            _size(weights.host.nbytes),
        )
    if weights.moved:
        table.add_row(
            "  of these, what the GPU cannot work on", str(len(weights.moved)), ", ".join(weights.moved[:3])
        )
    if weights.skipped_bytes:
        table.add_row("not loaded (layers for drafting)", "", _size(weights.skipped_bytes))
    return table


def _caches(result: estimates.Estimate) -> Sequence[RenderableType]:
    caches, mapped, device = result.caches, result.mapped, result.device
    if not caches.caches:
        return [Text(f"{result.model.arch} keeps no cache")]
    table = Table("cache", "layers", "cells", "bytes", "bytes a token", box=None, pad_edge=False)
    for cache in caches.caches:
        cells = f"{cache.cells:,}" if cache.streams == 1 else f"{cache.streams} x {cache.cells:,}"
        each = f"{cache.cell_bytes:,}" if not cache.recurrent else f"{cache.cell_bytes:,} a sequence"
        table.add_row(cache.kind, str(cache.layers), cells, _size(cache.nbytes(device)), each)
    if len(caches.caches) > 1:
        table.add_row("all", "", "", _size(caches.nbytes(device)), f"{caches.token_bytes:,}")
    pages = Table(
        f"elastic, {format_bytes(mapped.page)} pages",
        "reserved",
        f"mapped at {mapped.tokens:,} tokens",
        "ahead, at most",
        "a step",
        "tokens a step",
        box=None,
        pad_edge=False,
    )
    for row in mapped.caches:
        step = (_size(row.step_bytes), f"{row.step_tokens:,}") if row.step_bytes else ("mapped in full", "")
        pages.add_row(row.kind, _size(row.reserved), _size(row.mapped), _size(row.ahead), *step)
    if len(mapped.caches) > 1:
        pages.add_row("all", _size(mapped.reserved), _size(mapped.mapped), _size(mapped.ahead), "", "")
    return [table, Text(""), pages]


def _budget(result: estimates.Estimate) -> Sequence[RenderableType]:
    budget = result.budget
    if budget is None:
        return []
    table = Table(
        f"in {format_bytes(budget.budget)}",
        "models",
        "weights",
        "cache",
        "process",
        "compute",
        "each",
        box=None,
        pad_edge=False,
    )

    def row(name: str, count: str, share: Share) -> None:
        parts = (share.weights, share.cache, share.context, share.compute, share.total)
        table.add_row(name, count, *(format_bytes(part) for part in parts))

    row("stock", str(budget.stock_models), budget.stock)
    row(f"elastic, all awake, {budget.tokens:,} tokens each", str(budget.awake_models), budget.awake)
    row("elastic, asleep beside one awake", _count(budget.asleep_models), budget.asleep)
    return [Text(""), table]


def _count(models: int | None) -> str:
    return "any number" if models is None else str(models)
