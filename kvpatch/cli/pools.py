"""`kvpatch top|limit|trim|sleep|wake`: the running pools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvpatch import pools
from kvpatch.cli import options, top
from kvpatch.cli.output import Screen
from kvpatch.errors import KvpatchError, UsageError
from kvpatch.estimate.sizes import format_bytes, parse_bytes
from kvpatch.pools import targets
from kvpatch.runtime import Command

_LEAST_INTERVAL = 0.1
_MOST_WAIT = 86400

ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="ledger|socket|ollama",
        help="How to get the figures (default: the first that shows any).",
    ),
]
LedgerOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--ledger",
        metavar="FILE",
        help="A ledger file; may be repeated (default: $KVCACHED_LEDGER, else those in /dev/shm).",
    ),
]
SocketOption = Annotated[
    Path | None,
    typer.Option("--socket", metavar="PATH", help="The socket of kvcachedd ($OLLAMA_KVCACHED_SOCKET)."),
]
OllamaOption = Annotated[
    str | None,
    typer.Option("--ollama", metavar="HOST:PORT", help="Ask this Ollama, to look only ($OLLAMA_HOST)."),
]
LibraryOption = Annotated[
    Path | None,
    typer.Option(
        "--build",
        metavar="DIR",
        help="Take libkvcached of this build, or this libkvcached.so (default: the cache's, compiled on first use).",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="ID", help="On this device alone: host, or a GPU's UUID or PCI bus id."),
]
WaitOption = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", help="How long each process may take to answer.")
]
NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL|PID|pid:N|slot:N]...", help="Which processes (default: all that answer commands)."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        name="top", help="Watch the running pools: who holds which memory, mapped, reserved, asleep."
    )(_top)
    app.command(name="limit", help="Set how much the processes of a group may hold together.")(_limit)
    for command, text in (
        (Command.TRIM, "Have processes give back memory that holds nothing."),
        (Command.SLEEP, "Have idle processes put all their memory to sleep; the next request wakes them."),
        (Command.WAKE, "Have processes wake now, so that the next request need not wait."),
    ):
        _commanding(app, command, text)


def _top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Look once (without a terminal: always).")] = False,
    interval: Annotated[
        float, typer.Option("--interval", "-n", metavar="SECONDS", help="Between two looks.")
    ] = 1.0,
    by: ByOption = None,
    ledger: LedgerOption = None,
    socket: SocketOption = None,
    ollama: OllamaOption = None,
    build: LibraryOption = None,
    cache_dir: options.CacheOption = None,
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    if not _LEAST_INTERVAL <= interval <= _MOST_WAIT:
        raise UsageError(f"--interval {interval:g} is not between {_LEAST_INTERVAL} and {_MOST_WAIT} seconds")
    wish = pools.Wish(by=by, ledgers=tuple(ledger or ()), socket=socket, ollama=ollama)
    source = pools.source(wish, lambda: pools.library(build, cache_dir), pools.Drivers())
    try:
        view = source.look()
        if once or not screen.is_live:
            screen.result(view.to_json(), top.picture(view, screen.width))
            return
        screen.live(lambda: _again(source, screen.width), interval)
    finally:
        source.close()


def _again(source: pools.Source, width: int) -> RenderableType:
    """The picture of now; what is in the way of one is shown in its place, and may pass."""
    try:
        return top.picture(source.look(), width)
    except KvpatchError as error:
        return Text(error.message + (f"\nnext: {error.hint}" if error.hint else ""), "red")


def _limit(
    context: typer.Context,
    size: Annotated[
        str, typer.Argument(metavar="SIZE|none", help="20GB, 19.5GiB; none takes the limit away.")
    ],
    group: Annotated[
        str | None, typer.Option("--group", metavar="NAME", help="Whose limit (default: the only group's).")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="The limit of all groups together.")] = False,
    device: DeviceOption = None,
    by: ByOption = None,
    ledger: LedgerOption = None,
    socket: SocketOption = None,
    build: LibraryOption = None,
    cache_dir: options.CacheOption = None,
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    if card and group is not None:
        raise UsageError("--card is all groups together, --group one of them", hint="give one of them")
    limit = None if size.lower() == "none" else parse_bytes(size, "the limit")
    wish = pools.Wish(by=by, ledgers=tuple(ledger or ()), socket=socket, command="limit")
    with _writable(wish, build, cache_dir) as source:
        if isinstance(source, pools.Service):
            done = targets.set_limit_of_service(source, group, limit, card=card, device=device)
        else:
            done = targets.set_limit(targets.on_device(source.opened, device), group, limit, card=card)
    table = Table("device", "of", "limit", "charged", "", box=None, pad_edge=False)
    for one in done:
        over = (
            f"{format_bytes(one.overage)} over: nothing new fits until that has gone" if one.overage else ""
        )
        table.add_row(
            one.device,
            targets.CARD if one.group is None else one.group,
            "none" if one.limit is None else format_bytes(one.limit),
            format_bytes(one.charge),
            Text(over, "yellow"),
        )
    screen.result({"limits": [one.to_json() for one in done]}, table)


def _commanding(app: typer.Typer, command: Command, text: str) -> None:
    """Register a command to processes."""

    def run(
        context: typer.Context,
        names: NamesArgument = None,
        wait: WaitOption = 60.0,
        device: DeviceOption = None,
        ledger: LedgerOption = None,
        build: LibraryOption = None,
        cache_dir: options.CacheOption = None,
        json_output: options.JsonOption = False,
    ) -> None:
        del json_output
        screen: Screen = context.obj
        if not 0 < wait <= _MOST_WAIT:
            raise UsageError(f"--wait {wait:g} is not above 0 and at most {_MOST_WAIT} seconds")
        wish = pools.Wish(by="ledger", ledgers=tuple(ledger or ()), command=command.name.lower())
        with _writable(wish, build, cache_dir) as source:
            assert isinstance(source, pools.Ledgers)  # the wish says so
            chosen = targets.select(targets.on_device(source.opened, device), names or (), command)
            outcomes = targets.carry_out(chosen, command, wait_ms=max(1, round(wait * 1000)))
        table = Table("model", "pid", "slot", "device", "", box=None, pad_edge=False)
        for one in outcomes:
            freed = f"gave back {format_bytes(one.freed)}" if command is not Command.WAKE else "awake"
            word = Text(one.error.removeprefix("KVCACHED_"), "red") if one.error else Text(freed, "green")
            table.add_row(one.name, str(one.pid), str(one.slot), one.device, word)
        if any(one.error for one in outcomes):
            screen.show(table)
        targets.require_done(outcomes)
        screen.result({"outcomes": [one.to_json() for one in outcomes]}, table)

    app.command(name=command.name.lower(), help=text)(run)


@contextmanager
def _writable(
    wish: pools.Wish, build: Path | None, cache: Path | None
) -> Iterator[pools.Ledgers | pools.Service]:
    """A source that takes limits or commands. Raises DeniedError for one that only shows."""
    source = pools.source(wish, lambda: pools.library(build, cache), pools.Drivers())
    try:
        if isinstance(source, pools.Ollama):
            raise targets.only_shown(source, wish)
        yield source
    finally:
        source.close()
