"""Results as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvpatch.bench import ColdBuild
from kvpatch.bench import figures as benched
from kvpatch.demo import DemoReport
from kvpatch.doctor import Finding, LlamaCppRow, ReleaseRow
from kvpatch.pins import Pins
from kvpatch.pipeline import Outcome, Step
from kvpatch.plan import Plan
from kvpatch.smoke import SmokeReport

_DOCTOR = {
    "ok": ("ok", "green"),
    "index": ("from index", "cyan"),
    "missing": ("MISSING", "red"),
    "optional": ("optional", "yellow"),
    "wrong": ("WRONG", "red"),
}


def plan(decided: Plan, steps: Sequence[Step]) -> list[RenderableType]:
    """What would be built, from what, and which stages would run."""
    facts = _grid()
    facts.add_row("build", decided.name + (" (stock)" if decided.stock else ""))
    for source in (decided.ollama, decided.llama_cpp):
        if source is not None:
            facts.add_row(
                source.upstream, f"{source.ref} = {source.commit[:12]} ({source.kind}: {source.location})"
            )
    facts.add_row(
        "patches", f"{len(decided.ollama_patches)} for Ollama, {len(decided.llama_cpp_patches)} for llama.cpp"
    )
    facts.add_row("tools", ", ".join(f"{t.name} {t.version}" for t in decided.tools))
    facts.add_row("workspace", str(decided.workspace))
    facts.add_row("out", str(decided.out))
    rows = Table("stage", "key", "would", box=None, pad_edge=False)
    for step in steps:
        rows.add_row(step.stage, step.key[:12], "do nothing" if step.fresh else "run")
    return [facts, rows]


def outcome(decided: Plan, result: Outcome) -> list[RenderableType]:
    """One line for what was built; the progress said the rest."""
    last = result.stages[-1][0] if result.stages else ""
    if last not in ("compile", "smoke", "manifest"):
        return [Text(f"{decided.name}: {last} done in {decided.workspace}")]
    return [Text(f"{decided.label} is in {decided.out}")]


def smoke(report: SmokeReport) -> list[RenderableType]:
    """Every check with its time."""
    table = Table("check", "result", "seconds", "detail", box=None, pad_edge=False)
    for check in report.checks:
        result = Text("ok", "green") if check.ok else Text("FAILED", "red")
        table.add_row(check.name, result, f"{check.seconds:.1f}", check.detail)
    return [table]


def demo(report: DemoReport) -> list[RenderableType]:
    """Stock and elastic side by side, sizes in MiB."""
    table = Table(
        "KV cache",
        "stock reserved",
        "stock mapped",
        "elastic reserved",
        "elastic mapped",
        "tokens",
        box=None,
        pad_edge=False,
    )
    for row in report.rows:
        table.add_row(
            row.moment,
            _mib(row.stock_reserved),
            _mib(row.stock_mapped),
            _mib(row.elastic_reserved),
            _mib(row.elastic_mapped),
            {None: "", True: "equal", False: "DIFFERENT"}[row.tokens_equal],
        )
    return [table]


def doctor(findings: Sequence[Finding]) -> list[RenderableType]:
    """A row a finding."""
    table = Table("", "what", "found", "for", "cure", box=None, pad_edge=False)
    for finding in findings:
        word, style = _DOCTOR[finding.status]
        table.add_row(Text(word, style), finding.name, finding.found, finding.needed_for, finding.cure)
    return [table]


def cold_build(result: ColdBuild) -> list[RenderableType]:
    """A row a round, and the ratio of the medians."""
    table = Table("round", "upstream", "kvpatch", "its compile stage", box=None, pad_edge=False)
    rows = zip(result.upstream, result.patched, result.compile, strict=True)
    for number, (upstream, patched, compiled) in enumerate(rows, 1):
        table.add_row(str(number), f"{upstream:.1f} s", f"{patched:.1f} s", f"{compiled:.1f} s")
    lines: list[RenderableType] = [table, Text(f"kvpatch / upstream = {result.ratio:.3f} (medians)")]
    if len(result.patched) > 1:
        total = len(result.identical) + len(result.differing)
        lines.append(
            Text(f"{len(result.identical)} of {total} artifacts have the same sha256 in every round")
        )
        lines.extend(Text(f"differs: {name}") for name in result.differing)
    return lines


def bench(report: benched.Report) -> list[RenderableType]:
    """Medians with the middle half, a column a side; then the bounds and the notes."""
    sides = list(dict.fromkeys(side for row in report.rows for side in row.sides))
    table = Table("", "what", *sides, "of stock", "n", box=None, pad_edge=False)
    section = ""
    for row in report.rows:
        cells = [_spread(row.sides.get(side), row.unit) for side in sides]
        ratios = ", ".join(f"{side} {ratio:.3f}" for side, ratio in row.ratio.items())
        counts = {summary.n for summary in row.sides.values()}
        shown = row.section if row.section != section else ""
        section = row.section
        table.add_row(shown, row.name, *cells, ratios, "/".join(map(str, sorted(counts))))
    bounds = Table("bound", "found", "of", "", box=None, pad_edge=False)
    for bound in report.bounds:
        word = Text("ok", "green") if bound.holds else Text("MISSED", "red")
        bounds.add_row(bound.name, benched.bound_text(bound), bound.of, word)
    facts = _grid()
    for name in ("device", "driver", "model"):
        if name in report.facts:
            facts.add_row(name, str(report.facts[name]))
    return [facts, table, bounds, *(Text(f"note: {note}") for note in report.notes)]


def _spread(summary: benched.Summary | None, unit: str) -> str:
    if summary is None:
        return ""
    middle = benched.number(summary.median, unit)
    if summary.n == 1 or summary.low == summary.high:
        return middle
    word = f" {unit}" if unit not in ("bytes", "ratio") else " MiB" if unit == "bytes" else ""
    low, high = (benched.number(v, unit).removesuffix(word) for v in (summary.low, summary.high))
    return f"{middle} ({low} .. {high})"


def versions(rows: Sequence[ReleaseRow], known: Pins) -> Table:
    """A row a release, newest last."""
    table = Table(
        "release", "date", "profile", "pins", "verified with", "patches", "status", box=None, pad_edge=False
    )
    for row in rows:
        mark = " (default)" if row.version == known.default_ollama else ""
        table.add_row(
            row.version + mark,
            row.date,
            row.profile,
            row.llama_cpp,
            ", ".join(row.verified_with),
            str(row.patches),
            row.status,
        )
    return table


def llama_cpp(rows: Sequence[LlamaCppRow], known: Pins) -> Table:
    """A row a source distribution, newest last."""
    table = Table("llama.cpp", "date", "commit", "patches", "status", box=None, pad_edge=False)
    for row in rows:
        mark = " (default)" if row.version == known.default_sdist else ""
        table.add_row(row.version + mark, row.date, row.commit, str(row.patches), row.status)
    return table


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    return grid


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
