"""JSON over HTTP, from an address or a unix socket. Answers are bounded, proxies are not asked."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

MOST_BYTES = 16 << 20


class AnswerError(Exception):
    """No usable answer. `status` 0: none came; `body` is what the other side said, decoded if it is JSON."""

    def __init__(self, text: str, *, status: int = 0, body: Any = None, cause: OSError | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.body = body
        self.cause = cause


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket that is connected already."""

    def __init__(self, path: Path, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.settimeout(self.timeout)
            stream.connect(str(self._path))
            self.check(stream)
        except BaseException:
            stream.close()
            raise
        self.sock = stream

    def check(self, stream: socket.socket) -> None:
        """A place for subclasses to look at who answers; what they raise ends the connection."""


def exchange(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> Any:
    """One question, its answer decoded. Raises AnswerError."""
    try:
        text = None if body is None else json.dumps(body)
        headers = {"Accept": "application/json", "Connection": "close"}
        if text is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, path, body=text, headers=headers)
        answer = connection.getresponse()
        raw = answer.read(MOST_BYTES + 1)
    except OSError as error:
        raise AnswerError(error.strerror or str(error) or type(error).__name__, cause=error) from error
    except http.client.HTTPException as error:
        raise AnswerError(f"what answers does not speak HTTP ({type(error).__name__})") from error
    finally:
        connection.close()
    if len(raw) > MOST_BYTES:
        raise AnswerError(f"an answer of more than {MOST_BYTES} bytes", status=answer.status)
    try:
        decoded = json.loads(raw)
    except ValueError:
        decoded = None
    if answer.status != 200:
        raise AnswerError(_reason(answer.status, decoded, raw), status=answer.status, body=decoded)
    if decoded is None:
        raise AnswerError("its answer is not JSON", status=answer.status)
    return decoded


def _reason(status: int, decoded: Any, raw: bytes) -> str:
    said = ""
    if isinstance(decoded, dict):
        inner = decoded.get("error")
        if isinstance(inner, dict):
            decoded, inner = inner, None
        said = str(inner or decoded.get("message") or "")
    return f"HTTP {status}: {said or raw[:200].decode('utf-8', 'replace').strip() or 'no reason given'}"
