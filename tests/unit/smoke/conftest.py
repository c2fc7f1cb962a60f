"""A server in Python that stands in for the real ones: it behaves or misbehaves as its environment says."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpatch.smoke.server import ServerSpec

_SERVER = textwrap.dedent(
    """
    import http.server, json, os, signal, subprocess, sys, time

    mode, port = sys.argv[1], int(sys.argv[2])
    print("starting in mode", mode, flush=True)
    if mode == "refuse":
        print("error: no such model: tiny.gguf", flush=True)
        sys.exit(3)
    if mode == "never-ready":
        time.sleep(600)
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "leaves-child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/die":
                os.kill(os.getpid(), signal.SIGSEGV)  # any thread may take it, and not at once
            if self.path in ("/die", "/hang"):
                time.sleep(600)
            echo = json.dumps({"path": self.path, "connection": self.headers["Connection"]}).encode()
            body = {"/text": b"plain", "/list": b"[]"}.get(self.path, echo)
            self.send_response(500 if self.path == "/error" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            print("request", self.path, flush=True)

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., ServerSpec]:
    """Makes the start of a fake server in a mode."""
    script = tmp_path / "server.py"
    script.write_text(_SERVER, encoding="utf-8")

    def make(mode: str = "good", *, start_seconds: float = 20.0) -> ServerSpec:
        return ServerSpec(
            name="fake",
            argv=lambda port: [sys.executable, script, mode, str(port)],
            ready_path="/health",
            start_seconds=start_seconds,
        )

    return make
