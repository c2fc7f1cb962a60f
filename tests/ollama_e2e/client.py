"""One request of a client, and what came of it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.ollama_e2e.questions import Question

TIMEOUT = 400.0  # beyond Ollama's own load timeout: a request is never given up here first


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said, in a form that must be equal wherever the question is asked. `margins`: where each token
    ends in the text, and by how much its log-probability was above the next best one's; only where asked for."""

    text: str = ""
    vectors: tuple[tuple[float, ...], ...] = ()
    reason: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    margins: tuple[tuple[int, float], ...] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A request without an answer. `status`: 0 where the connection broke; `partial`: after some of an answer."""

    status: int
    text: str
    partial: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one request: an answer, a failure, or neither, where the client hung up. `at`: when it was sent."""

    question: Question
    streamed: bool
    at: float
    seconds: float
    answer: Answer | None = None
    failure: Failure | None = None
    dropped: bool = False


def ask(
    url: str,
    question: Question,
    *,
    stream: bool = False,
    keep_alive: str | int | None = None,
    margins: bool = False,
) -> Outcome:
    """Sends it and waits for all of the answer."""
    stream = stream and question.way != "embed"
    body = _body(question, stream, keep_alive)
    if margins and question.way != "embed":
        body |= {"logprobs": True, "top_logprobs": 2}
    at = time.monotonic()
    answer: Answer | None = None
    failure: Failure | None = None
    try:
        with requests.Session() as session:
            session.trust_env = False
            session.headers["Connection"] = "close"
            with session.post(
                url + question.path(),
                json=body,
                timeout=TIMEOUT,
                stream=stream,
            ) as response:
                if response.status_code != 200:
                    failure = Failure(status=response.status_code, text=_error(response.text))
                elif stream:
                    answer, failure = _streamed(question, response)
                else:
                    answer = _answer(question, response.json())
    except (requests.RequestException, ValueError) as error:
        failure = Failure(status=0, text=f"{type(error).__name__}: {error}")
    return Outcome(
        question=question,
        streamed=stream,
        at=at,
        seconds=time.monotonic() - at,
        answer=answer,
        failure=failure,
    )


def hang_up(url: str, question: Question, *, after_pieces: int, wait: float) -> Outcome:
    """Sends it as a stream and closes the connection: after so many pieces, or after `wait` seconds if they do not
    come by then."""
    at = time.monotonic()
    body = json.dumps(_body(question, True, None)).encode()
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST {question.path()} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    failure = None
    try:
        with socket.create_connection((host, int(port)), timeout=10.0) as connection:
            connection.sendall(head.encode() + body)
            seen = b""
            while after_pieces and seen.count(b"\n{") < after_pieces:
                left = at + wait - time.monotonic()
                if left <= 0:
                    break
                connection.settimeout(left)
                try:
                    more = connection.recv(65536)
                except TimeoutError:
                    break
                if not more:
                    break
                seen += more
            if seen and b" 200 " not in seen.split(b"\r\n", 1)[0]:
                failure = Failure(
                    status=int(seen.split(b" ", 2)[1]), text=seen.decode(errors="replace")[-300:]
                )
    except OSError as error:
        failure = Failure(status=0, text=f"{type(error).__name__}: {error}")
    return Outcome(
        question=question,
        streamed=True,
        at=at,
        seconds=time.monotonic() - at,
        failure=failure,
        dropped=failure is None,
    )


def _body(question: Question, stream: bool, keep_alive: str | int | None) -> dict[str, Any]:
    body = question.body()
    if question.way != "embed":
        body["stream"] = stream
    if keep_alive is not None:
        body["keep_alive"] = keep_alive
    return body


def _error(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text[:500]
    return str(value.get("error", value)) if isinstance(value, dict) else text[:500]


def _said(question: Question, value: dict[str, Any]) -> str:
    if question.way == "chat":
        return str((value.get("message") or {}).get("content", ""))
    return str(value.get("response", ""))


def _answer(question: Question, value: dict[str, Any], text: str | None = None) -> Answer:
    if question.way == "embed":
        vectors = tuple(tuple(float(x) for x in vector) for vector in value["embeddings"])
        return Answer(vectors=vectors, prompt_tokens=int(value.get("prompt_eval_count", 0)))
    return Answer(
        text=_said(question, value) if text is None else text,
        reason=str(value.get("done_reason", "")),
        prompt_tokens=int(value.get("prompt_eval_count", 0)),
        tokens=int(value.get("eval_count", 0)),
        margins=_margins(value.get("logprobs") or ()),
    )


def _margins(logprobs: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    found = []
    end = 0
    for token in logprobs:
        end += len(token["token"])
        best = sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True)
        found.append((end, best[0] - best[1] if len(best) > 1 else 0.0))
    return tuple(found)


def _streamed(question: Question, response: requests.Response) -> tuple[Answer | None, Failure | None]:
    text = ""
    for line in response.iter_lines():
        if not line:
            continue
        piece = json.loads(line)
        if "error" in piece:
            return None, Failure(status=200, text=str(piece["error"]), partial=bool(text))
        text += _said(question, piece)
        if piece.get("done"):
            return _answer(question, piece, text), None
    return None, Failure(status=200, text="the stream ended without `done`", partial=bool(text))
