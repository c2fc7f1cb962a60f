"""Processes that hold memory in a ledger, and servers that answer what they are told."""

from __future__ import annotations

import contextlib
import json
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from kvpatch.runtime import Library

MIB = 1 << 20
UUID = "8f1e4c2a-0b5d-4e3f-9a6b-7c8d9e0f1a2b"
BUS = "0000:1b:00.0"

CHILD = """
import sys
from pathlib import Path
from kvpatch.runtime import Context, Kind, Library, Options
library, ledger, name, group, slot = sys.argv[1:]
options = Options(ledger=ledger, name=name, group=group, limit=64 << 20, slot=int(slot))
with Context(options, library=Library(Path(library))) as context:
    kv, weights = context.reserve(1 << 30), context.reserve(4 << 20, kind=Kind.WEIGHTS)
    kv.write(0, b"kept" * 4096)
    weights.write(0, b"w" * (4 << 20))
    kv.ensure(1 << 20, 8192)
    kv.release(1 << 20, 8192)
    for line in iter(sys.stdin.readline, ""):
        if line == "enter\\n":
            context.enter()
        elif line == "leave\\n":
            context.leave()
        print(kv.read(0, 4).decode() if line == "read\\n" else "", flush=True)
"""


class Process:
    """A process with 16 KiB of KV, 4 MiB of weights and 8 KiB that hold nothing."""

    def __init__(self, lib: Library, ledger: Path, name: str, group: str, slot: int) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(lib.path), str(ledger), name, group, str(slot)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self._child.pid
        try:
            self.ask("ready")
        except BaseException:
            self.end()
            raise

    def ask(self, line: str) -> str:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        assert answer.endswith("\n"), f"the process ended at {line!r}"
        return answer.strip()

    def end(self) -> None:
        """As a crash does: nothing is said to anybody."""
        self._child.kill()
        with self._child:
            pass


Start = Callable[..., Process]


Answer = Callable[[str, str, Any], "tuple[int, Any]"]


class Answering:
    """An HTTP server in a thread. `answer` gets method, path and body; `asked` has what came."""

    def __init__(self, server: socketserver.BaseServer) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.answer: Answer = lambda method, path, body: (404, {})
        self.address: Any = server.server_address


@contextlib.contextmanager
def answering(make: Callable[[type[BaseHTTPRequestHandler]], socketserver.BaseServer]) -> Iterator[Answering]:
    """`make` makes the server for a handler. An answer that is bytes goes out as it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            told.asked.append((self.command, self.path, body))
            status, answer = told.answer(self.command, self.path, body)
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST

        def address_string(self) -> str:
            return "client"  # a unix socket's has no address

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing on standard error."""

    with make(Handler) as server:
        told = Answering(server)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()
