"""`kvpatch service`: starts kvcachedd of a build, or writes systemd's units for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvpatch import generate, paths, service
from kvpatch.cli import options
from kvpatch.cli.output import Screen
from kvpatch.errors import CompileError, GenerateError, UsageError

VARIABLE = "OLLAMA_KVCACHED_SOCKET"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="service",
        help="Start kvcachedd, which lets several Ollama servers and other programs share a limit, in place of this "
        "process; or write systemd's units for it.",
    )(_service)


def _service(
    context: typer.Context,
    build: Annotated[
        Path,
        typer.Option("--build", metavar="DIR", help="A folder that `kvpatch build --ollama --out` wrote."),
    ] = Path("out"),
    socket: Annotated[
        Path | None,
        typer.Option(
            "--socket",
            metavar="PATH",
            help=f"The socket to serve (default: ${VARIABLE}; in units {service.SOCKET}).",
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            metavar="SIZE",
            help="What all programs may have together on each device, such as 20GB.",
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="NAME", help="A system group whose members may connect, too."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="ID",
            help="host, or a GPU's bus id or UUID; may be repeated (default: every GPU, else host).",
        ),
    ] = None,
    print_units: Annotated[
        Path | None,
        typer.Option(
            "--print-units",
            metavar="DIR",
            help="Write kvcachedd.socket and kvcachedd.service there; start nothing.",
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            "--user",
            metavar="NAME",
            help="In the units: the user that the Ollama servers run as (default: ollama).",
        ),
    ] = None,
    json_output: options.JsonOption = False,
) -> None:
    del json_output
    screen: Screen = context.obj
    program = service.of_build(build)
    given = service.Options(socket=socket, limit=limit, group=group, devices=tuple(device or ()))
    if print_units is not None:
        _write_units(screen, program, given, print_units, user or "ollama")
        return
    if user is not None:
        raise UsageError(
            "--user has a meaning in units alone", hint="add --print-units DIR, or start it as that user"
        )
    if screen.json_mode:
        raise UsageError(
            "the service takes this process over, and has no JSON to print", hint="leave --json out"
        )
    if socket is None and not os.environ.get(VARIABLE) and "LISTEN_FDS" not in os.environ:
        raise UsageError("no socket to serve", hint=f"--socket PATH, or set {VARIABLE}")
    if socket is not None and not socket.is_absolute():
        given = service.Options(
            socket=socket.absolute(), limit=limit, group=group, devices=tuple(device or ())
        )
    try:
        os.execv(program, [str(program), *given.arguments()])
    except OSError as error:
        raise CompileError(
            f"{program} cannot be started: {error.strerror or error}", hint="build it on this machine"
        ) from error


def _write_units(screen: Screen, program: Path, given: service.Options, folder: Path, user: str) -> None:
    files = service.units(paths.data_dir(), program, given, user)
    try:
        generate.write(files, folder)
    except GenerateError as error:
        raise UsageError(error.message, hint="name a folder that can be written") from error
    table = Table.grid(padding=(0, 2))
    for file in files:
        table.add_row("written", str(folder / file.dest))
    hint = service.installed(user, given.socket or service.SOCKET)
    table.add_row("next", hint)
    screen.result({"units": [str(folder / file.dest) for file in files], "next": hint}, table)
