"""Verdicts on what a server's KV cache held in the course of a session, by the ledger and by the kernel."""

from __future__ import annotations

from kvpatch.smoke.llama import STEP_CELLS, Sample, Session
from kvpatch.smoke.report import Figure, Outcome

_START_SHARE = 10  # "far below reserved": at most a tenth of it
_PAGE = 4096


def memory_at_start(session: Session) -> Outcome:
    """Reserved is what the whole context takes; mapped is at most a tenth of it."""
    start = session.sample("start")
    full = session.config.model.cache_bytes(session.config.cells)
    if start.reserved < full:
        raise session.failed(f"{start.reserved} bytes reserved, the context takes {full}", **_figures(start))
    if start.mapped * _START_SHARE > start.reserved:
        raise session.failed(
            f"{start.mapped} bytes mapped at start, more than a tenth of the {start.reserved} reserved",
            **_figures(start),
        )
    return Outcome(f"{start.mapped} of {start.reserved} bytes mapped", _figures(start))


def memory_grows(session: Session) -> Outcome:
    """After each (longer) prompt at least its cells are mapped, and at most three steps more than those."""
    model = session.config.model
    asked = session.asked()
    figures: dict[str, Figure] = {}
    before = session.sample("start")
    for now in asked:
        figures.update({f"{now.moment}: cells": now.cells, f"{now.moment}: mapped": now.mapped})
        least = model.cache_bytes(now.cells)
        padded = -(-now.cells // STEP_CELLS) * STEP_CELLS
        most = model.cache_bytes(padded + 2 * STEP_CELLS) + 2 * model.shape.layers * _PAGE
        if not least <= now.mapped <= most:
            raise session.failed(
                f"{now.mapped} bytes mapped with {now.cells} cells in use, expected {least} to {most}",
                **figures,
            )
        if now.mapped <= before.mapped:
            raise session.failed(f"mapped did not grow: {before.mapped}, then {now.mapped}", **figures)
        before = now
    return Outcome(" < ".join(str(s.mapped) for s in asked) + " bytes", figures)


def memory_kept(session: Session) -> Outcome:
    """A while after a request has finished its pages are still mapped, and at most one step that was mapped ahead."""
    last = session.asked()[-1]
    held = session.sample("held")
    step = session.config.model.cache_bytes(STEP_CELLS)
    if not last.mapped <= held.mapped <= last.mapped + step:
        raise session.failed(
            f"{last.mapped} bytes after the request, {held.mapped} a while later", **_figures(held)
        )
    return Outcome(f"{held.mapped} bytes", _figures(held))


def memory_rested(session: Session) -> Outcome:
    """Some seconds after the last request only the cells in use are mapped, in steps: what was mapped ahead went."""
    rested = session.sample("rested")
    model = session.config.model
    padded = -(-rested.cells // STEP_CELLS) * STEP_CELLS
    least, most = model.cache_bytes(rested.cells), model.cache_bytes(padded)
    if not least <= rested.mapped <= most:
        raise session.failed(
            f"{rested.mapped} bytes mapped with {rested.cells} cells in use, expected {least} to {most}",
            **_figures(rested),
        )
    return Outcome(f"{rested.mapped} bytes for {rested.cells} cells", _figures(rested))


def memory_falls(session: Session) -> Outcome:
    """Within a second of erasing the slot, without another request, at most one step of the cache is
    mapped."""
    before = session.asked()[-1]
    after = session.sample("erased")
    step = session.config.model.cache_bytes(STEP_CELLS)
    seconds = session.erase_seconds or 0.0
    figures: dict[str, Figure] = {
        "before": before.mapped,
        "after": after.mapped,
        "seconds": round(seconds, 3),
    }
    if after.mapped > step or after.usable > step:
        raise session.failed(
            f"{before.mapped} bytes before erasing the slot, {after.mapped} by the ledger and {after.usable} in use "
            f"{seconds:.2f} s after, more than one step ({step})",
            **figures,
        )
    if after.mapped >= before.mapped:
        raise session.failed(f"mapped did not fall: {before.mapped}, then {after.mapped}", **figures)
    return Outcome(f"{before.mapped} to {after.mapped} bytes in {seconds:.2f} s", figures)


def memory_witnessed(session: Session) -> Outcome:
    """At every moment the bytes that the ledger says are mapped are those that the kernel lets the process
    use, and those that it holds in memory for it (pages are filled when they are mapped)."""
    figures: dict[str, Figure] = {}
    moments = (session.sample("start"), *session.asked(), session.sample("held"), session.sample("erased"))
    for now in moments:
        figures[now.moment] = (
            f"mapped {now.mapped}, usable {now.usable}, held {now.held_min} to {now.held_max}"
        )
        if now.usable != now.mapped:
            raise session.failed(
                f"{now.moment}: {now.mapped} bytes mapped by the ledger, by the kernel {now.usable} are usable",
                **figures,
            )
        if not now.held_min <= now.mapped <= now.held_max:
            raise session.failed(
                f"{now.moment}: {now.mapped} bytes mapped by the ledger, the kernel holds {now.held_min} to "
                f"{now.held_max}",
                **figures,
            )
    return Outcome(f"{len(moments)} moments agree with /proc", figures)


def _figures(taken: Sample) -> dict[str, int | float | str]:
    return {
        "mapped": taken.mapped,
        "reserved": taken.reserved,
        "usable": taken.usable,
        "held_min": taken.held_min,
        "held_max": taken.held_max,
    }
