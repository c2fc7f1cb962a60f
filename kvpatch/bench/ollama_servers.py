"""`ollama serve` under measurement: how both sides are started, what they are asked, and what shows what they did.

Times are taken at the client. That no model was woken, put to sleep or loaded meanwhile is read from the server's log
and from its children, not from how fast it was.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpatch import manifest
from kvpatch.bench.device import Device
from kvpatch.bench.ollama_models import Member, Store
from kvpatch.errors import UsageError
from kvpatch.smoke.install import Install
from kvpatch.smoke.ollama import Instance
from kvpatch.smoke.report import CheckFailed
from kvpatch.smoke.server import Server, serve
from kvpatch.stages.output import MANIFEST

SIDES = ("stock", "on")
ASLEEP, AWAKE = "asleep", "awake"
_LOADED = "60m"
_ANSWER_SECONDS = 300.0
_POLL_SECONDS = 0.05
_EVENTS = {
    "sleep": "kvcached: put to sleep",
    "wake": "kvcached: woke",
    "unload": "kvcached: unload",
    "start": "starting llama-server",
}
_TOOK = re.compile(r"\bmodel=(\S+) .*\btook=(\S+)")
_SPAN = re.compile(r"([0-9.]+)(h|ms|m|s|us|µs|ns)")
_UNITS = {"h": 3.6e6, "m": 6e4, "s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "ns": 1e-6}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a benchmark runs on and with. `budget`: bytes for all models of one side; `batch`: tokens of a prompt that
    are processed at once, 0 for Ollama's default. `threads` matters on a CPU alone."""

    stock: Install
    patched: Install
    store: Store
    device: Device
    work: Path
    budget: int
    threads: int = 1
    batch: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.name == "cuda"

    def instance(self, side: str) -> Instance:
        settings = {
            "OLLAMA_MODELS": str(self.store.folder),
            "OLLAMA_KEEP_ALIVE": _LOADED,
            "OLLAMA_NUM_PARALLEL": "1",
        }
        if not self.on_gpu:
            # Memory-mapped weights are the page cache's (see options), repacked ones a buffer of another kind.
            settings |= {"CUDA_VISIBLE_DEVICES": "-1", "LLAMA_ARG_REPACK": "0"}
        if side == "on":
            settings |= {
                "OLLAMA_KVCACHED_ENABLED": "true",
                "OLLAMA_KVCACHED_MEMORY_GB": f"{self.budget / 1e9:.9f}",
            }
        install = self.stock if side == "stock" else self.patched
        return Instance(install=install, folder=self.work, name=side, settings=settings)


def installs(stock: Path, patched: Path) -> tuple[Install, Install, dict[str, Any]]:
    """Both builds of Ollama and what they were made from. Raises UsageError when they are not a stock and a patched
    build of one release; of folders without a manifest only the presence of the library is known."""
    found = (Install.detect(stock), Install.detect(patched))
    facts: dict[str, Any] = {}
    releases = []
    for install, name in zip(found, ("stock", "patched"), strict=True):
        if install.ollama is None:
            raise UsageError(f"{install.root} has no ollama, the other build has", hint="give two of a kind")
        wrong = install.patched is not (name == "patched")
        if (install.root / MANIFEST).is_file():
            made = manifest.read(install.root)
            wrong = wrong or made["stock"] != (name == "stock")
            releases.append((made["release"], *sorted(made["upstream_commits"].items())))
            facts[name] = {key: made[key] for key in ("label", "release", "series", "upstream_commits")}
        if wrong:
            raise UsageError(
                f"{install.root} is not a {name} build",
                hint="--stock DIR is a build made with `kvpatch build --stock --ollama RELEASE`, --patched DIR one "
                "without --stock",
            )
    if len(set(releases)) == 2:
        raise UsageError("the builds are of two releases of Ollama, or of two llama.cpp", hint=f"{releases}")
    if len(releases) < 2:
        facts["same_release"] = "not known: a build has no manifest"
    return (*found, facts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One streamed answer. Milliseconds from the request on, at the client; `rate`: tokens a second by the server's
    own clock, without the prompt."""

    text: str
    first_ms: float
    whole_ms: float
    tokens: int
    rate: float


class Talker:
    """One `ollama serve` and a kept connection to it. What it refuses, and a connection that breaks, raise
    CheckFailed."""

    def __init__(self, setup: Setup, side: str, server: Server) -> None:
        self.setup = setup
        self.side = side
        self.server = server
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_ANSWER_SECONDS)

    def ask(
        self, member: Member, prompt: str, count: int, context: int, *, keep: str | None = None
    ) -> Answer:
        """A greedy answer of `count` tokens, without a template, through /api/generate."""
        options: dict[str, Any] = {"num_ctx": context, "num_predict": count, "temperature": 0, "seed": 1}
        if self.setup.batch:
            options["num_batch"] = self.setup.batch
        if not self.setup.on_gpu:
            options |= {"num_thread": self.setup.threads, "use_mmap": False}
        body: dict[str, Any] = {"model": member.name, "prompt": prompt, "raw": True, "options": options}
        if keep is not None:
            body["keep_alive"] = keep
        sent = json.dumps(body).encode()
        try:
            began = time.perf_counter()
            self._connection.request("POST", "/api/generate", sent, {"Content-Type": "application/json"})
            return self._answer(member, self._connection.getresponse(), began, count)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self.server.unanswered(f"{self.server.name}: a completion broke off", error) from error

    def _answer(self, member: Member, response: http.client.HTTPResponse, began: float, count: int) -> Answer:
        if response.status != 200:
            text = response.read().decode(errors="replace")[:500]
            raise self.server.failed(f"{member.name} was answered {response.status}: {text}")
        text, first, last = "", 0.0, {}
        for line in response:
            now = time.perf_counter()
            last = json.loads(line)
            if "error" in last:
                raise self.server.failed(f"{member.name}: {last['error']}")
            if not first and (last.get("response") or last.get("done")):
                first = now
            text += str(last.get("response", ""))
        whole = time.perf_counter()
        if not last.get("done") or last.get("eval_count") != count:
            raise self.server.failed(f"asked {member.name} for {count} tokens, got {str(last)[:300]}")
        spent = int(last.get("eval_duration", 0)) / 1e9
        return Answer(
            text=text,
            first_ms=(first - began) * 1000,
            whole_ms=(whole - began) * 1000,
            tokens=count,
            rate=count / spent if spent else 0.0,
        )

    def states(self) -> dict[str, Mapping[str, Any]]:
        """The models that /api/ps shows, by name, with what it says of their elastic memory (of stock: nothing)."""
        shown = self.server.json("GET", "/api/ps")["models"]
        return {str(one["name"]).rpartition(":")[0]: one.get("kvcached") or {} for one in shown}

    def children(self) -> dict[str, int]:
        """The llama-servers with a model, by its digest."""
        found = {}
        for pid in self.server.descendants():
            with contextlib.suppress(OSError):  # ended meanwhile
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"--model" in words:
                    file = words[words.index(b"--model") + 1].decode()
                    found[file.rpartition("sha256-")[2]] = pid
        return found

    def did(self, kind: str) -> int:
        """How often the log says so until now."""
        return self.server.log_text().count(_EVENTS[kind])

    def took(self, kind: str) -> dict[str, list[float]]:
        """Milliseconds of each sleep or wake by the log, by model."""
        found: dict[str, list[float]] = {}
        for line in self.server.log_text().splitlines():
            if _EVENTS[kind] in line and (match := _TOOK.search(line)):
                found.setdefault(match[1].strip('"').rpartition(":")[0], []).append(milliseconds(match[2]))
        return found

    def history(self) -> tuple[object, ...]:
        """Equal twice: nothing was loaded, unloaded, put to sleep or woken in between."""
        return (*(self.did(kind) for kind in _EVENTS), tuple(sorted(self.children().items())))

    def wait_state(self, members: tuple[Member, ...], state: str, seconds: float = 60.0) -> None:
        """Until /api/ps shows all of them in this state."""
        self._wait(
            lambda shown: all(shown.get(m.name, {}).get("state") == state for m in members), state, seconds
        )

    def unload(self, members: tuple[Member, ...], seconds: float = 60.0) -> None:
        """Unload what is loaded of these, and wait until neither /api/ps nor a process shows them."""
        loaded = self.states()
        for member in members:
            if member.name in loaded:
                body = {"model": member.name, "keep_alive": 0, "stream": False}
                self.server.json("POST", "/api/generate", json=body)
        self._wait(
            lambda shown: (
                not any(m.name in shown for m in members)
                and not {m.digest for m in members} & self.children().keys()
            ),
            "unloaded",
            seconds,
        )

    def _wait(self, there: Any, what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not there(shown := self.states()):
            if time.monotonic() > end:
                raise self.server.failed(f"not all models are {what} after {seconds:g} s: {shown}")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def talker(setup: Setup, side: str) -> Iterator[Talker]:
    """A server of this side while the block runs."""
    with serve(setup.instance(side).spec(), setup.work) as server:
        one = Talker(setup, side, server)
        try:
            yield one
            if server.returncode() is not None:
                raise CheckFailed(f"{server.name} ended by itself", logs=server.logs())
        finally:
            one.close()


def milliseconds(text: str) -> float:
    """Of a duration as Go writes it: 1m2.5s, 87.3ms. Raises ValueError."""
    parts = _SPAN.findall(text.strip('"'))
    if not parts or "".join(a + b for a, b in parts) != text.strip('"'):
        raise ValueError(f"{text!r} is no duration")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
