"""The command line: parses, calls the library, renders. Nothing else in kvpatch prints."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer
from typer.main import get_command

from kvpatch import __version__
from kvpatch.cli import output
from kvpatch.cli.app import app
from kvpatch.cli.output import ParseError
from kvpatch.errors import KvpatchError

INTERRUPTED = 130
_BUG = 70


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `kvpatch` script; ends the process with the exit code of design section 4."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code; everything that can go wrong is rendered here."""
    screen = output.Screen(json_mode="--json" in argv, command=output.command_name(argv))
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with screen.parsing():
            returned = get_command(app).main(
                args=argv, prog_name="kvpatch", standalone_mode=False, obj=screen
            )
        code = returned if isinstance(returned, int) else 0
        # Ctrl-C inside a command reaches us in this form: typer makes an exit of its own out of it.
        if code == INTERRUPTED:
            screen.interrupted(INTERRUPTED)
        return code
    except typer.Exit as done:
        return int(done.exit_code)
    except SystemExit:
        # The parser ends the process itself where nobody reads what it prints (help), and nowhere else.
        return output.READER_GONE
    except ParseError as error:
        return screen.usage_error(error)
    except KvpatchError as error:
        return screen.failure(error)
    except (KeyboardInterrupt, typer.Abort):
        screen.interrupted(INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        return screen.bug(error, _crash_file(argv), _BUG)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    # A CI system ends a job with SIGTERM: unwind as for Ctrl-C, so that no child is left behind.
    raise KeyboardInterrupt


def _crash_file(argv: list[str]) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix="kvpatch-crash-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"kvpatch {__version__} on Python {sys.version}\narguments: {argv}\n\n")
        traceback.print_exc(file=file)
    return Path(file.name)
