"""The picture of the running pools: a line a device, a row a process."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from kvpatch.estimate.sizes import format_bytes
from kvpatch.pools import Device, Pool, State, View

_STYLES = {
    State.AWAKE.value: "green",
    State.BUSY.value: "bold green",
    State.WAITING.value: "bold yellow",
    State.WAKING.value: "yellow",
    State.PARTLY.value: "cyan",
    State.ASLEEP.value: "cyan",
    State.LEASED.value: "dim",
}
_EIGHTHS = " ▏▎▍▌▋▊▉"
# Columns of the terminal from which on a bar has so many cells.
_BARS = ((150, 14), (125, 10), (105, 6), (0, 3))


class Bar:
    """How much of a whole is there, in eighths of a cell; without a whole, nothing."""

    def __init__(self, part: int, whole: int | None, cells: int, style: str) -> None:
        self._share = min(part / whole, 1.0) if whole else None
        self._cells = cells
        self._style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._share is None:
            yield Segment(" " * self._cells)
            return
        if options.ascii_only:
            full = round(self._share * self._cells)
            yield Segment("#" * full + "." * (self._cells - full))
            return
        eighths = round(self._share * self._cells * 8)
        # Something is not nothing, and not everything is not everything.
        eighths = max(eighths, 1) if self._share > 0 else 0
        full, part = divmod(eighths, 8)
        text = "█" * full + (_EIGHTHS[part] if part else "")
        yield Segment(text.ljust(self._cells), Style.parse(f"{self._style} on grey23"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._cells, self._cells)


def picture(view: View, width: int) -> RenderableType:
    """All devices, one below the other."""
    cells = next(cells for least, cells in _BARS if width >= least)
    parts: list[RenderableType] = []
    for device in view.devices:
        parts.append(_heading(device))
        if device.problem:
            parts.append(Text(f"  {device.problem}", "red"))
        elif not device.pools:
            parts.append(Text("  nobody", "dim"))
        else:
            parts.append(_rows(device, cells))
    if not view.devices:
        parts.append(Text("nobody", "dim"))
    parts.append(Text(f"by {view.way.value}: {view.where}", "dim"))
    parts.extend(Text(f"note: {note}", "yellow") for note in view.notes)
    return Group(*parts)


def _heading(device: Device) -> Text:
    line = Text.assemble((device.name or device.id, "bold"))
    if device.name and device.id not in ("host", "all"):
        line.append(f"  {device.id}", "dim")
    facts = []
    if device.mapped is not None:
        facts.append(f"ledger {format_bytes(device.mapped)}")
        if device.context_bytes:
            facts.append(f"contexts {format_bytes(device.context_bytes)}")
    if device.driver is not None:
        used, total = format_bytes(device.driver.used), format_bytes(device.driver.total)
        facts.append(f"driver {used} of {total} in use")
    facts.append(f"charged {format_bytes(device.charge)}")
    if device.limit is not None:
        facts[-1] += f" of {format_bytes(device.limit)}"
    line.append("  " + ", ".join(facts))
    for group in device.groups:
        limit = "no limit set" if group.limit is None else f"limit {format_bytes(group.limit)}"
        over = group.limit is not None and group.charge > group.limit
        line.append(
            f"\n  {group.name or 'all'}: charged {format_bytes(group.charge)}, {limit}", "red" if over else ""
        )
    return line


def _rows(device: Device, cells: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("  model", no_wrap=True, overflow="ellipsis", min_width=8)
    for name in ("pid", "slot"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("weights", "KV of reserved", "charge of limit"):
        table.add_column("", width=cells)
        table.add_column(name, no_wrap=True)
    for name in ("host copy", "spare", "last use"):
        table.add_column(name, justify="right", no_wrap=True)
    for pool in device.pools:
        table.add_row(*_cells(pool, cells))
    return table


def _cells(pool: Pool, cells: int) -> list[RenderableType]:
    weights = pool.weights_mapped + (pool.weights_asleep or 0)
    return [
        f"  {pool.name or '(no name)'}",
        "" if pool.pid is None else str(pool.pid),
        "" if pool.slot is None else str(pool.slot),
        Text(_state(pool), _STYLES.get(pool.state, "")),
        Bar(pool.weights_mapped, weights, cells, "blue"),
        _of(pool.weights_mapped, weights if weights != pool.weights_mapped else None),
        Bar(pool.kv_mapped, pool.kv_reserved, cells, "magenta"),
        _of(pool.kv_mapped, pool.kv_reserved),
        Bar(pool.charge, pool.limit, cells, "yellow"),
        _of(pool.charge, pool.limit),
        format_bytes(pool.host_bytes) if pool.host_bytes else "",
        format_bytes(pool.spare) if pool.spare else "",
        _ago(pool.last_use_seconds),
    ]


def _state(pool: Pool) -> str:
    text = pool.state
    if pool.wants:
        text += f" for {format_bytes(pool.wants)}"
    if pool.queued:
        text += f", {pool.queued} queued"
    return text


def _of(part: int, whole: int | None) -> str:
    return format_bytes(part) if whole is None else f"{format_bytes(part)} of {format_bytes(whole)}"


def _ago(seconds: float | None) -> str:
    """Short, and coarser the longer ago."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
