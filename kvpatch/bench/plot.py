"""Charts of a report, by matplotlib where it is installed (the extra `bench`)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from kvpatch.bench.figures import Chart, Report

_COLORS = {"stock": "#8a8f98", "off": "#5b8ff9", "on": "#2ca58d"}
_COLUMNS = 3
_FEW = 4  # values that make no box


def draw(report: Report, out: Path) -> Path | None:
    """OUT/KIND.svg, a box plot a chart. None without charts, or without matplotlib: then the report says so."""
    charts = [c for c in report.charts if any(c.series.values())]
    if not charts:
        return None
    try:
        import matplotlib
    except ImportError:
        report.notes.append("no plot: matplotlib is not installed (pip install 'kvpatch[bench]')")
        return None
    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = -(-len(charts) // _COLUMNS)
    figure, axes = pyplot.subplots(
        rows, _COLUMNS, figsize=(4.2 * _COLUMNS, 3.0 * rows), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for chart, axis in zip(charts, flat, strict=False):
        _box(chart, axis)
    for axis in flat[len(charts) :]:
        axis.set_axis_off()
    figure.suptitle(
        f"kvpatch bench {report.kind}: {report.facts.get('device', '')}, {report.facts.get('model', '')}"
    )
    path = out / f"{report.kind}.svg"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _box(chart: Chart, axis: Any) -> None:
    scale, unit = (2**20, "MiB") if chart.unit == "bytes" else (1, chart.unit)
    shown = {name: [v / scale for v in values] for name, values in chart.series.items() if values}
    colors = [_COLORS.get(name, "#cccccc") for name in shown]
    if max(map(len, shown.values())) < _FEW:
        axis.bar(list(shown), [statistics.median(values) for values in shown.values()], color=colors)
    else:
        boxes = axis.boxplot(list(shown.values()), patch_artist=True, whis=(1, 99))
        axis.set_xticks(range(1, len(shown) + 1), list(shown))
        for box, color in zip(boxes["boxes"], colors, strict=True):
            box.set_facecolor(color)
    axis.set_title(chart.title, fontsize=9)
    axis.set_ylabel(unit)
    axis.grid(axis="y", alpha=0.3)
