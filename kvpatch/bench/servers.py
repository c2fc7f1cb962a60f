"""llama-servers under measurement: what is compared, how each is started, and what is asked of it.

Times of a step are the server's own: with `timings_per_token` each streamed token carries the microsecond at which the
server had it (since the prompt's end), so neither the network nor this program is in them. Times to a first token are
taken at the client, since that is where a user waits.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpatch import manifest
from kvpatch.bench.device import Device
from kvpatch.bench.models import Model
from kvpatch.errors import UsageError
from kvpatch.smoke import options
from kvpatch.smoke.install import Install
from kvpatch.smoke.report import CheckFailed
from kvpatch.smoke.server import Server, ServerSpec, serve
from kvpatch.stages.output import MANIFEST

_KEPT_SECONDS = 1.0
KINDS = ("kv", "weights", "compute")


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the things compared: `stock`, `off` (patched, switch off), `on`."""

    name: str
    install: Install
    elastic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a benchmark runs on and with. `threads` matters on a CPU alone."""

    stock: Install
    patched: Install
    model: Model
    device: Device
    work: Path
    threads: int = 1
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[Side, Side, Side]:
        return (self.side("stock"), self.side("off"), self.side("on"))

    def side(self, name: str) -> Side:
        install = self.stock if name == "stock" else self.patched
        return Side(name=name, install=install, elastic=name == "on")


def installs(stock: Path, patched: Path) -> tuple[Install, Install, dict[str, Any]]:
    """Both builds and what they were made from. Raises UsageError when they are not a stock and a patched build of
    one llama.cpp; of folders without a manifest only the presence of the library is known."""
    found = (Install.detect(stock), Install.detect(patched))
    for install, wanted in zip(found, (False, True), strict=True):
        if install.patched is not wanted:
            raise UsageError(
                f"{install.root} is {'a stock' if wanted else 'a patched'} build",
                hint="--stock DIR is a build made with `kvpatch build --stock`, --patched DIR one without it",
            )
    facts: dict[str, Any] = {}
    commits = []
    for install, name in zip(found, ("stock", "patched"), strict=True):
        if not (install.root / MANIFEST).is_file():
            continue
        made = manifest.read(install.root)
        commits.append(str(made["upstream_commits"]["llama.cpp"]))
        facts[name] = {"label": made["label"], "llama.cpp": commits[-1], "series": made["series"]}
        if made["stock"] != (name == "stock"):
            raise UsageError(f"{install.root} is not a {name} build, by its {MANIFEST}")
    if len(set(commits)) == 2:
        raise UsageError(
            f"the builds are of two llama.cpp: {commits[0][:12]} and {commits[1][:12]}",
            hint="build both from the same --llama-cpp",
        )
    if len(commits) < 2:
        facts["same_commit"] = "not known: a build has no manifest"
    return (*found, facts)


def spec(
    setup: Setup,
    side: Side,
    *,
    context: int,
    slots: int = 1,
    extra: Sequence[str] = (),
    name: str = "",
) -> ServerSpec:
    """A server whose model is wholly on the device; `context` cells in all slots together."""
    saves = setup.work / "slots"
    saves.mkdir(parents=True, exist_ok=True)
    server = side.install.llama_server
    on_device = ("-ngl", "999") if setup.device.name == "cuda" else _on_cpu(setup, server)

    def argv(port: int) -> Sequence[str | Path]:
        return [
            server,
            *("--model", setup.model.path, "--host", "127.0.0.1", "--port", str(port)),
            *("-c", str(context), "-np", str(slots), "-fa", "on", "--no-kv-unified"),
            *("--no-webui", "--offline", "--cache-ram", "0", "--no-context-shift", "-fit", "off"),
            *options.if_known(server, "--no-log-timestamps"),
            *("--slot-save-path", saves),  # without one, slots cannot be erased
            *on_device,
            *extra,
        ]

    return ServerSpec(
        name=name or f"llama-server-{side.name}",
        argv=argv,
        ready_path="/health",
        env=lambda port: {
            # A ledger of its own: what runs besides must not decide how much this one may have.
            "KVCACHED_LEDGER": str(setup.work / "ledger"),
            "OLLAMA_KVCACHED_ENABLED": "true" if side.elastic else "false",
            "OLLAMA_KVCACHED_HTTP": "1",
        },
        start_seconds=120.0,
    )


def _on_cpu(setup: Setup, server: Path) -> tuple[str, ...]:
    # Memory-mapped weights are the page cache's and cannot sleep; repacked ones are a buffer of another kind.
    threads = str(setup.threads)
    held = (*options.without_memory_map(server), "--no-repack")
    return (*options.on_cpu(server), *held, "-t", threads, "-tb", threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion. `seconds`: from the request to its whole answer. `step_ms`: between one token and the next."""

    tokens: tuple[int, ...]
    seconds: float
    prompt_n: int
    prompt_ms: float
    predicted_ms: float
    step_ms: tuple[float, ...] = ()


class Client:
    """A kept connection to a server. What the server refuses, and a connection that breaks, raise CheckFailed."""

    def __init__(self, server: Server, side: Side) -> None:
        self.server = server
        self.side = side
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        self._used = 0.0

    def complete(self, prompt: Sequence[int], count: int, *, cached: bool = True) -> Answer:
        """A greedy answer of exactly `count` tokens. `cached`: what the slot has of the prompt is used."""
        began = self._connect()
        body = self._body([*prompt], count, cached=cached)
        value = json.loads(self._post("/completion", body).read())
        return self._answer(value, count, time.perf_counter() - began)

    def together(self, prompts: Sequence[Sequence[int]], count: int) -> list[Answer]:
        """One answer a prompt, all at once: they are placed before the first step and decode in one batch."""
        began = self._connect()
        body = self._body([[*p] for p in prompts], count, cached=False)
        value = json.loads(self._post("/completion", body).read())
        seconds = time.perf_counter() - began
        parts = value if isinstance(value, list) else [value]
        if len(parts) != len(prompts):
            raise self.server.failed(f"{len(prompts)} prompts got {len(parts)} answers")
        return [self._answer(part, count, seconds) for part in parts]

    def stream(self, prompt: Sequence[int], count: int, *, cached: bool = True) -> Answer:
        """As `complete`, with the time of each step."""
        began = self._connect()
        body = self._body([*prompt], count, cached=cached) | {"stream": True, "timings_per_token": True}
        tokens: list[int] = []
        at: list[float] = []
        last: dict[str, Any] = {}
        for line in self._post("/completion", body):
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            part = json.loads(line[6:])
            if "error" in part:
                raise self.server.failed(f"a stream broke off: {part['error']}")
            last = part.get("timings", last)
            new = part.get("tokens", [])
            if new and not part.get("stop"):
                tokens += new
                at.append(float(last["predicted_ms"]))
        seconds = time.perf_counter() - began
        # The server ends the connection behind a stream, without saying so.
        self._used = 0.0
        value = {"tokens": tokens, "timings": last}
        if len(at) != count:
            raise self.server.failed(f"{count} tokens came in {len(at)} parts: steps cannot be told apart")
        steps = tuple(b - a for a, b in itertools.pairwise(at))
        return self._answer(value, count, seconds, steps)

    def erase(self, slot: int = 0) -> None:
        """Forget a slot's cells."""
        self._connect()
        self._post(f"/slots/{slot}?action=erase", {}).read()

    def figures(self) -> list[dict[str, Any]]:
        """The elastic memory of each device by GET /kvcached; empty where the server has none."""
        if not self.side.elastic:
            return []
        body = self.server.json("GET", "/kvcached")
        devices = body.get("devices", [])
        return [dict(entry) for entry in devices] if isinstance(devices, list) else []

    def mapped(self) -> dict[str, int]:
        """Bytes on the model's device: mapped by kind, and what GET /kvcached says besides (`ready`, `host`, ...)."""
        all_of_it = self.figures()
        wanted = "CUDA" if any(str(entry["device"]).startswith("CUDA") for entry in all_of_it) else "CPU"
        total: dict[str, int] = {}
        for entry in all_of_it:
            if not str(entry["device"]).startswith(wanted):
                continue
            for kind in KINDS:
                total[kind] = total.get(kind, 0) + int(entry["mapped_bytes"][kind])
            for name in ("reserved", "idle", "ready", "pooled", "asleep", "host"):
                total[name] = total.get(name, 0) + int(entry[f"{name}_bytes"])
        return total

    def page_bytes(self) -> int:
        """Of the model's device (the largest there is: a card's pages are larger than the host's)."""
        return max((int(entry["page_bytes"]) for entry in self.figures()), default=0)

    def last_ms(self, what: str) -> float:
        """`sleep` or `wake`: milliseconds that the library took for the last one, of the slowest device."""
        return max((float(f[f"last_{what}_ms"]) for f in self.figures()), default=0.0)

    def command(self, what: str) -> float:
        """POST /kvcached/`what`; its seconds."""
        began = self._connect()
        self._post(f"/kvcached/{what}", {}).read()
        return time.perf_counter() - began

    def asleep(self) -> bool:
        return bool(self.server.json("GET", "/props").get("is_sleeping"))

    def until_asleep(self, seconds: float) -> None:
        """Wait, asking what wakes nobody. Raises CheckFailed when the server is still awake then."""
        deadline = time.monotonic() + seconds
        while not self.asleep():
            if time.monotonic() > deadline:
                raise self.server.failed(
                    f"{self.server.name} is still awake after {seconds:g} s without a request"
                )
            time.sleep(0.02)

    def close(self) -> None:
        self._connection.close()

    def _connect(self) -> float:
        """A connection that the server has not closed (it does after 5 s without a request); the time, which begins
        once there is one."""
        if time.monotonic() - self._used > _KEPT_SECONDS:
            self._connection.close()
            try:
                self._connection.connect()
            except OSError as error:
                raise self._unanswered("a connection", error) from error
        self._used = time.monotonic()
        return time.perf_counter()

    def _unanswered(self, what: str, error: Exception) -> CheckFailed:
        self._connection.close()
        self._used = 0.0
        return self.server.unanswered(f"{self.server.name}: {what} got no answer", error)

    def _body(self, prompt: Any, count: int, *, cached: bool) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "seed": 1,
            "ignore_eos": True,
            "cache_prompt": cached,
            "return_tokens": True,
        }

    def _post(self, path: str, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        text = json.dumps(body)
        try:
            self._connection.request("POST", path, text, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._unanswered(f"POST {path}", error) from error
        self._used = time.monotonic()
        if response.status != 200:
            detail = response.read(500).decode("utf-8", "replace")
            raise self.server.failed(f"{self.server.name}: POST {path} answered {response.status}: {detail}")
        return response

    def _answer(
        self, value: Mapping[str, Any], count: int, seconds: float, steps: tuple[float, ...] = ()
    ) -> Answer:
        tokens = value.get("tokens")
        timings = value.get("timings")
        if not isinstance(tokens, list) or not isinstance(timings, dict) or len(tokens) != count:
            raise self.server.failed(f"an answer of {count} tokens was asked for: {str(value)[:300]}")
        return Answer(
            tokens=tuple(int(t) for t in tokens),
            seconds=seconds,
            prompt_n=int(timings["prompt_n"]),
            prompt_ms=float(timings["prompt_ms"]),
            predicted_ms=float(timings["predicted_ms"]),
            step_ms=steps,
        )


@contextlib.contextmanager
def client(setup: Setup, side: Side, started: ServerSpec) -> Iterator[Client]:
    """A running server of this description, and a connection to it."""
    with serve(started, setup.work) as server:
        talking = Client(server, side)
        try:
            yield talking
        finally:
            talking.close()
