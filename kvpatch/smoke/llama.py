"""Talking to llama-server: how it is started for a check, what it answers, and what its memory looks like
meanwhile.

A *session* is one life of a server: a fixed list of requests, with the memory of its cache read at named
moments. Two sessions that differ only in the elastic cache being on must give the same answers;
`llama_checks` compares them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpatch.smoke import smaps
from kvpatch.smoke.holdings import Holdings, holdings
from kvpatch.smoke.install import Install
from kvpatch.smoke.models import TinyModel, prompt_ids
from kvpatch.smoke.options import on_cpu, without_memory_map
from kvpatch.smoke.report import CheckFailed
from kvpatch.smoke.server import Server, ServerSpec, serve

STEP_CELLS = 256  # llama.cpp reads its cache in multiples of this many cells
_ALTERNATIVES = 3
_SETTLE_SECONDS = 1.0
_HOLD_SECONDS = 1.2
_REST_SECONDS = 6.0  # idle pages are given back five seconds after the last decode
_POLL_SECONDS = 0.02

_REGION = re.compile(r"kvcached: region base=0x([0-9a-f]+) size=(\d+) name=(.*)")
_MAPPED = re.compile(r"kvcached: mapped = (\d+) reserved = \d+")
SHIFT_LINE = "slot context shift"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What a server is started with. `shift`: context shift is on. `copied`: weights are read into memory of
    the server's own, which can sleep, in place of mapping the file. `words`: more options."""

    name: str
    model: TinyModel
    flash: bool
    cells: int = 8192
    shift: bool = False
    copied: bool = False
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Elastic:
    """The elastic cache's settings; `undercommit` pages too few are mapped on purpose, `limit` as a user
    writes it. `commands`: the server takes those of its users, and of the ledger's."""

    on: bool
    undercommit: int = 0
    limit: str | None = None
    commands: bool = False

    def env(self) -> dict[str, str]:
        env = {"OLLAMA_KVCACHED_ENABLED": "true" if self.on else "false"}
        if self.undercommit:
            env["KVCACHED_TEST_UNDERCOMMIT_PAGES"] = str(self.undercommit)
        if self.limit is not None:
            env["OLLAMA_KVCACHED_MEMORY_GB"] = self.limit
        if self.commands:
            env["OLLAMA_KVCACHED_HTTP"] = "1"
        return env


OFF = Elastic(on=False)
ON = Elastic(on=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One completion: `prompt` word ids of pattern `salt`, `answer` tokens to be generated."""

    prompt: int
    answer: int
    salt: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Generated token ids, and for each the probabilities of it and its best alternatives as (id, log
    probability). `processed`: prompt tokens that were not in the cache."""

    tokens: tuple[int, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...]
    text: str
    truncated: bool
    processed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """KV cache bytes at a moment: `mapped` by the ledger, `reserved` by the logged address ranges, and as the
    kernel reports them for these ranges (`usable`; `held_min`..`held_max` physically present). `cells`: cells
    that hold tokens. `charged`: what counts towards the limit, weights and compute buffers included."""

    moment: str
    mapped: int
    reserved: int
    usable: int
    held_min: int
    held_max: int
    cells: int
    charged: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What one life of a server showed. `samples` is empty for one whose cache is not elastic."""

    config: Config
    asks: int
    answers: tuple[Answer, ...]
    samples: tuple[Sample, ...]
    erase_seconds: float | None
    shifts: int
    elastic_lines: int
    log: Path
    logs: Mapping[str, str] = field(default_factory=dict)

    def sample(self, moment: str) -> Sample:
        """The sample of a moment. Raises CheckFailed when the server's cache was not elastic then."""
        for taken in self.samples:
            if taken.moment == moment:
                return taken
        raise self.failed(f"no figures of an elastic cache were logged at the moment {moment!r}")

    def asked(self) -> tuple[Sample, ...]:
        """The samples taken after each answer, in order. Raises CheckFailed when one is missing."""
        return tuple(self.sample(f"ask {n}") for n in range(1, self.asks + 1))

    def failed(self, detail: str, **figures: int | float | str) -> CheckFailed:
        return CheckFailed(detail, figures=figures, logs=self.logs)


def server_spec(install: Install, config: Config, elastic: Elastic, folder: Path) -> ServerSpec:
    """A llama-server with one slot (equality is claimed for one slot only) that may be erased."""
    saves = folder / "slots"
    saves.mkdir(parents=True, exist_ok=True)

    def argv(port: int) -> Sequence[str | Path]:
        return [
            install.llama_server,
            *("--model", config.model.path, "--host", "127.0.0.1", "--port", str(port)),
            *("-c", str(config.cells), "-np", "1", "-fa", "on" if config.flash else "off"),
            # ggml's threads wait for each other by spinning: on a busy machine two are slower than one.
            *("-t", "1", "-tb", "1"),
            *("--no-webui", "--offline", "--slot-save-path", saves, "--cache-ram", "0"),
            *("--log-verbosity", "4", *on_cpu(install.llama_server)),
            *(("--context-shift",) if config.shift else ("--no-context-shift",)),
            *(without_memory_map(install.llama_server) if config.copied else ()),
            *config.words,
        ]

    return ServerSpec(
        name=f"llama-server-{'on' if elastic.on else 'off'}",
        argv=argv,
        ready_path="/health",
        # A ledger of its own: the user's, with the models of running servers in it, is not for tests.
        env=lambda port: {"KVCACHED_LEDGER": str(ledger_path(folder)), **elastic.env()},
    )


def ledger_path(folder: Path) -> Path:
    """The ledger of the servers that `server_spec` starts with this folder."""
    return folder / "ledger"


def complete(
    server: Server, ask: Ask, *, after: Sequence[int] | None = None, timeout: float = 120.0
) -> Answer:
    """One greedy completion; `after`: these ids come before the prompt's. Raises CheckFailed for a bad
    answer, or one of another length than asked for."""
    asked = _completion_body(ask)
    asked["prompt"] = [*(after or ()), *prompt_ids(ask.prompt, ask.salt)]
    body = server.json("POST", "/completion", json=asked, timeout=timeout)
    tokens = body.get("tokens")
    probabilities = body.get("completion_probabilities")
    if not isinstance(tokens, list) or not isinstance(probabilities, list):
        raise server.failed(f"/completion answered without tokens or probabilities: keys {sorted(body)}")
    if len(tokens) != ask.answer or len(probabilities) != ask.answer:
        raise server.failed(
            f"/completion gave {len(tokens)} tokens and {len(probabilities)} probabilities, not {ask.answer}"
        )
    return Answer(
        tokens=tuple(int(t) for t in tokens),
        alternatives=tuple(_alternatives(p) for p in probabilities),
        text=str(body.get("content", "")),
        truncated=bool(body.get("truncated", False)),
        processed=_processed(server, body),
    )


def _processed(server: Server, body: Mapping[str, Any]) -> int:
    timings = body.get("timings")
    count = timings.get("prompt_n") if isinstance(timings, Mapping) else None
    if not isinstance(count, int):
        raise server.failed(f"/completion does not say how much of the prompt it processed: {timings!r}")
    return count


def _completion_body(ask: Ask) -> dict[str, object]:
    return {
        "prompt": prompt_ids(ask.prompt, ask.salt),
        "n_predict": ask.answer,
        "temperature": 0,
        "seed": 1,
        "cache_prompt": True,
        "return_tokens": True,
        "n_probs": _ALTERNATIVES,
    }


def refused(server: Server, ask: Ask, *, timeout: float = 120.0) -> tuple[int, str, str | None]:
    """Status, error message and Retry-After header of a completion that must be refused. Raises CheckFailed
    when it is not, or when the answer is no JSON error."""
    response = server.request("POST", "/completion", json=_completion_body(ask), timeout=timeout)
    if response.status_code < 400:
        raise server.failed(
            f"a completion of {ask.prompt} tokens was answered {response.status_code}, not refused"
        )
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError) as error:
        raise server.failed(f"the refusal is no JSON error: {response.text[:300]}") from error
    return response.status_code, message, response.headers.get("Retry-After")


def erase(server: Server) -> None:
    """Forget the slot's cache."""
    server.json("POST", "/slots/0?action=erase", json={}, timeout=10.0)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first element in which two sequences differ (or at which one ends), or None."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def _alternatives(entry: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(entry, dict):
        raise CheckFailed(f"unexpected entry in completion_probabilities: {entry!r}")
    top = entry.get("top_logprobs", [])
    return tuple((int(t["id"]), float(t["logprob"])) for t in (entry, *top))


def kv_ranges(text: str) -> tuple[smaps.Range, ...]:
    """Address ranges of the elastic KV caches by a server's log; none without any. Only ranges of KV caches
    are logged."""
    return tuple(smaps.Range(start=int(m[1], 16), size=int(m[2])) for m in _REGION.finditer(text))


def log_peak(text: str) -> int:
    """The most bytes that a server ever logged as mapped, of all kinds together."""
    return max((int(m[1]) for m in _MAPPED.finditer(text)), default=0)


def witness(
    install: Install, ledger: Path, text: str, pid: int, *, settle: float
) -> tuple[smaps.Usage, Holdings] | None:
    """What the kernel shows of the KV caches of a server, and what the ledger says of it; None without an
    elastic one in its log. Both change while they are read: up to `settle` seconds are allowed until they
    agree."""
    deadline = time.monotonic() + settle
    ranges = kv_ranges(text)
    while ranges:
        before = holdings(install, ledger, pid)
        try:
            usage = smaps.usage(smaps.read(pid), ranges)
        except OSError as error:
            raise CheckFailed(f"cannot read the memory of process {pid}: {error}") from error
        if (
            usage.usable == before.kv and holdings(install, ledger, pid) == before
        ) or time.monotonic() > deadline:
            return usage, before
        time.sleep(_POLL_SECONDS)
    return None


def sample(
    server: Server,
    install: Install,
    ledger: Path,
    moment: str,
    cells: int,
    *,
    settle: float = _SETTLE_SECONDS,
) -> Sample | None:
    """Read the cache's memory now. Where ledger and kernel do not come to agree, both are returned as they differ."""
    seen = witness(install, ledger, server.log_text(), server.pid, settle=settle)
    if seen is None:
        return None
    usage, held = seen
    return Sample(
        moment=moment,
        mapped=held.kv,
        reserved=usage.size,
        usable=usage.usable,
        held_min=usage.held_min,
        held_max=usage.held_max,
        cells=cells,
        charged=held.charge,
    )


def run_session(
    install: Install,
    config: Config,
    elastic: Elastic,
    asks: Sequence[Ask],
    folder: Path,
    *,
    erase_then: Ask | None = None,
    rest: bool = False,
) -> Session:
    """Start a server, ask `asks` one after another and stop it. Moments sampled: "start", then "ask 1", "ask
    2", ...; with `erase_then` the last answer is followed by "held" (after 1.2 s without a request), an
    erasure of the slot, "erased" (at most 1 s later, no request in between) and one more completion."""
    answers: list[Answer] = []
    samples: list[Sample | None] = []
    erase_seconds: float | None = None
    with serve(server_spec(install, config, elastic, folder), folder) as server:

        def take(moment: str, cells: int) -> None:
            samples.append(sample(server, install, ledger_path(folder), moment, cells))

        take("start", 0)
        cells = 0
        for number, ask in enumerate(asks, 1):
            answers.append(complete(server, ask))
            # The last token generated is not in the cache yet.
            cells = min(ask.prompt + ask.answer - 1, config.cells)
            take(f"ask {number}", cells)
        if erase_then is not None:
            if elastic.on:
                time.sleep(_HOLD_SECONDS)
                take("held", cells)
                if rest:
                    time.sleep(_REST_SECONDS)
                    take("rested", cells)
            erase(server)
            begin = time.monotonic()
            erased = _watch_fall(server, install, folder, begin + 1.0)
            erase_seconds = time.monotonic() - begin
            samples.append(erased)
            answers.append(complete(server, erase_then))
        if server.returncode() is not None:
            raise server.failed(f"{server.name} ended by itself")
        logs = server.logs()
    text = server.log_text()
    return Session(
        config=config,
        asks=len(asks),
        answers=tuple(answers),
        samples=tuple(s for s in samples if s is not None),
        erase_seconds=erase_seconds,
        shifts=text.count(SHIFT_LINE),
        elastic_lines=sum("kvcached:" in line for line in text.splitlines()),
        log=server.log,
        logs=logs,
    )


def _watch_fall(server: Server, install: Install, folder: Path, deadline: float) -> Sample | None:
    """Read the memory until no page of the cache is mapped, or until `deadline`."""
    while True:
        now = sample(server, install, ledger_path(folder), "erased", 0, settle=0.0)
        if now is None or (now.mapped == 0 and now.usable == 0) or time.monotonic() > deadline:
            return now
        time.sleep(_POLL_SECONDS)
