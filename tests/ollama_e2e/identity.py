"""Switched off, a patched build is stock to all who look: the same JSON, the same argv and environment of the child."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from kvpatch.smoke.install import LIBRARY, Install
from kvpatch.smoke.ollama import children, loaded, wait_gone
from kvpatch.smoke.server import MARK
from tests.ollama_e2e import sides
from tests.ollama_e2e.questions import Question
from tests.ollama_e2e.setting import Setting
from tests.ollama_e2e.sides import Side
from tests.ollama_e2e.verdict import Evidence

# Values that are other each time: of these keys only the type is compared.
_TIMES = re.compile(r"(_duration|_at)$")
_RANDOM = ("LLAMA_MEDIA_MARKER", MARK)
_TIMEOUT = 120.0
_SHOWN = 6
_MODEL = "e2e-b"
# How the switch may be written: left out, and off.
_OFF: tuple[Mapping[str, str], ...] = ({}, {sides.ENABLED: "false"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Face:
    """What a server shows: by what was asked of it."""

    answers: Mapping[str, Any]
    children: Mapping[str, Any]
    opened: tuple[str, ...]


def check(setting: Setting) -> Evidence:
    """Both builds, with the same home, store and requests, one after the other."""
    problems: list[str] = []
    compared = 0
    for off in _OFF:
        name = ", ".join(f"{key}={value}" for key, value in off.items()) or "no setting"
        stock = _face(setting, setting.options.stock, off)
        patched = _face(setting, setting.options.patched, off)
        found = [
            *differences(stock.answers, patched.answers),
            *differences(stock.children, patched.children),
        ]
        problems += [f"{name}: {text}" for text in found[:_SHOWN]]
        if len(found) > _SHOWN:
            problems.append(f"{name}: and {len(found) - _SHOWN} other differences")
        problems += [f"{name}: {text}" for text in patched.opened]
        compared += len(stock.answers) + len(stock.children)
    return Evidence(name="identity", problems=tuple(problems), figures={"compared": compared})


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two JSON values are not equal, with both sides."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in [*one, *(key for key in other if key not in one)]:
            at = f"{where}/{key}"
            if key not in other:
                found.append(f"{at}: only in stock: {one[key]!r}")
            elif key not in one:
                found.append(f"{at}: not in stock: {other[key]!r}")
            else:
                found += differences(one[key], other[key], at)
        # Go writes members in the order of its fields: that is part of the face too.
        if not found and list(one) != list(other):
            found.append(f"{where}: members in another order: {list(other)}, stock {list(one)}")
        return found
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            text
            for number, (left, right) in enumerate(zip(one, other, strict=True))
            for text in differences(left, right, f"{where}/{number}")
        ]
    return [] if one == other and type(one) is type(other) else [f"{where}: {other!r}, stock {one!r}"]


def plain(value: Any, key: str = "") -> Any:
    """Without times and durations."""
    if _TIMES.search(key):
        return type(value).__name__
    if key == "models":
        # Models of one second, or that end at the same time, come in an order of chance.
        return sorted((plain(member) for member in value), key=lambda member: str(member["name"]))
    if isinstance(value, dict):
        return {name: plain(member, name) for name, member in value.items()}
    if isinstance(value, list):
        return [plain(member) for member in value]
    return value


def _face(setting: Setting, install: Install, off: Mapping[str, str]) -> Face:
    folder = setting.options.folder
    ledger = folder / "ledger-of-none"
    settings = {**sides.stock_settings(), **off, "KVCACHED_LEDGER": str(ledger)}
    with sides.start(install, folder, "identity", setting.members, settings) as side:
        answers: dict[str, Any] = {}
        for name, path, body in _requests(setting):
            answers[name] = _asked(side, path, body)
        shown = {
            f"child {number}": _child(side, pid) for number, pid in enumerate(sorted(children(side.server)))
        }
        answers["/api/ps"] = _asked(side, "/api/ps", None)
        answers["ollama ps"] = _columns(side.instance.command(side.server.port, "ps"))
        opened = _opened(side)
        for model in sorted(loaded(side.server)):
            answers[f"unload {model}"] = _asked(side, "/api/generate", {"model": model, "keep_alive": 0})
        wait_gone(side.server, [member.name for member in setting.members])
        answers["/api/ps, nothing loaded"] = _asked(side, "/api/ps", None)
    if ledger.exists():
        opened.append("the ledger was made")
    return Face(answers=answers, children=shown, opened=tuple(opened))


def _requests(setting: Setting) -> list[tuple[str, str, Any]]:
    """Of every kind, good and bad. None as body: a GET."""
    generate = setting.question(_MODEL, way="generate")
    chat = Question(model="e2e-f", way="chat", salt=5, words=20, answer=12, num_ctx=4096)
    embed = setting.question("e2e-embed")
    body = generate.body()
    long = {**body, "prompt": body["prompt"] + " ba" * 400, "options": {**body["options"], "num_ctx": 128}}
    return [
        ("/api/version", "/api/version", None),
        ("/api/tags", "/api/tags", None),
        ("show", "/api/show", {"model": _MODEL}),
        ("generate", "/api/generate", {**body, "stream": False}),
        ("generate again", "/api/generate", {**body, "stream": False}),
        ("generate, streamed", "/api/generate", {**body, "stream": True}),
        ("generate, cut", "/api/generate", {**long, "stream": False}),
        ("generate, too long", "/api/generate", {**long, "stream": False, "shift": False, "truncate": False}),
        ("generate, with a template", "/api/generate", {**body, "raw": False, "stream": False}),
        ("chat", "/api/chat", {**chat.body(), "stream": False}),
        ("chat, streamed", "/api/chat", {**chat.body(), "stream": True}),
        ("chat, keep_alive", "/api/chat", {**chat.body(), "stream": False, "keep_alive": -1}),
        ("embed", "/api/embed", embed.body()),
        ("old embeddings", "/api/embeddings", {"model": embed.model, "prompt": "ba be", "options": {"num_thread": 1}}),
        ("load", "/api/generate", {"model": "e2e-c", "stream": False}),
        ("openai chat", "/v1/chat/completions", {"model": _MODEL, "max_tokens": 8, "temperature": 0, "seed": 1,
            "messages": [{"role": "user", "content": "ba be bi"}]}),
        ("no such model", "/api/generate", {"model": "e2e-none", "prompt": "ba"}),
        ("an embedder asked to generate", "/api/generate", {"model": "e2e-embed", "prompt": "ba", "stream": False}),
        ("a bad option", "/api/generate", {**body, "options": {"num_ctx": "many"}}),
    ]  # fmt: skip


def _asked(side: Side, path: str, body: Any) -> dict[str, Any]:
    if body is None:
        answer = requests.get(side.url + path, timeout=_TIMEOUT)
    else:
        answer = requests.post(side.url + path, json=body, timeout=_TIMEOUT)
    lines = [line for line in answer.text.splitlines() if line.strip()]
    try:
        values = [plain(json.loads(line)) for line in lines]
    except ValueError:
        values = lines
    for value in values:
        if isinstance(value, dict):
            # Of OpenAI's form: made up anew each time.
            value.update({key: type(value[key]).__name__ for key in ("id", "created") if key in value})
    return {
        "status": answer.status_code,
        "type": answer.headers.get("Content-Type", ""),
        "body": values,
    }


def _child(side: Side, pid: int) -> dict[str, Any]:
    """argv and environment, without what is chosen anew each time or names the folder of the build."""
    root = str(side.instance.install.root)

    def text(raw: bytes) -> str:
        return raw.decode(errors="replace").replace(root, "ROOT").replace(f":{side.server.port}", ":PORT")

    proc = Path(f"/proc/{pid}")
    argv = [text(word) for word in (proc / "cmdline").read_bytes().split(b"\0")]
    argv = ["PORT" if before == "--port" else word for before, word in zip(["", *argv], argv, strict=False)]
    entries = [text(entry) for entry in (proc / "environ").read_bytes().split(b"\0") if entry]
    environ = dict(entry.split("=", 1) for entry in entries)
    environ.update({name: "random" for name in _RANDOM if name in environ})
    return {"argv": argv, "environ": dict(sorted(environ.items()))}


def _columns(text: str) -> list[str]:
    """Of `ollama ps`, without the times."""
    return sorted(re.sub(r"\s\s+\S+( \S+)* from now\s*$", "", line) for line in text.splitlines())


def _opened(side: Side) -> list[str]:
    """Of the elastic memory: which of the processes have its library or a ledger mapped."""
    found = []
    for pid in (side.server.pid, *children(side.server)):
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        if LIBRARY in maps or "kvcached-" in maps:
            found.append(f"process {pid} has {LIBRARY} or a ledger mapped")
    return found
