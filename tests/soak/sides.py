"""The servers of a soak: how each kind is started, what it answers, and what it holds by the ledger and the
kernel."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import requests

from kvpatch import runtime
from kvpatch.runtime import CallError, Command, Kind, Slot
from kvpatch.smoke.holdings import library
from kvpatch.smoke.install import Install
from kvpatch.smoke.llama import log_peak
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.options import if_known, on_cpu, without_memory_map
from kvpatch.smoke.report import CheckFailed
from kvpatch.smoke.server import Server, ServerSpec, serve
from tests.soak.schedule import Action, Request

Device = Literal["cpu", "cuda"]
_TIMEOUT = 300.0
_RETRIES = 12
_SETTLE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One way to start a server. `cells`: of a slot; `unified`: one cache of slots * cells for all of them.
    `longest` and `answer`: most tokens of a prompt, and of an answer. `room`: the limit lets this many times
    the KV memory be mapped that the largest request takes alone."""

    name: str
    model: Path
    slots: int
    cells: int
    unified: bool
    flash: bool
    kind: str
    longest: int
    answer: int
    room: float
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What came of a request. `whole`: the stream was not cut. `refusals`: texts of 503 answers before that;
    `refused`: it was never answered."""

    request: Request
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    whole: bool = True
    refused: bool = False
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a server holds while nothing runs, after so many `answers`: mapped bytes of each kind, what the
    ledger charges, `host` memory kept for the next sleep, and by the kernel resident bytes beside that memory,
    mappings and open files."""

    kinds: tuple[int, int, int]
    claim: int
    host: int
    rss: int
    maps: int
    files: int
    answers: int = 0


@dataclass(slots=True)
class Done:
    """Steps that were done: how many of each, how many found it busy, and bytes that sleeping gave back."""

    counts: dict[str, int] = field(default_factory=dict)
    busy: int = 0
    slept: int = 0


class Side:
    """A server that runs. Any thread may call it."""

    def __init__(
        self, server: Server, profile: Profile, install: Install, ledger: Path, *, elastic: bool
    ) -> None:
        self.server, self.profile, self.elastic = server, profile, elastic
        self.done = Done()
        self._install, self._ledger = install, ledger
        self._lock = threading.Lock()

    def ask(self, request: Request, *, slot: int | None = None, cached: bool = True) -> Answered:
        """One greedy completion. Refusals (503 with Retry-After) are retried a few times."""
        refusals: list[str] = []
        with requests.Session() as session:
            session.trust_env = False
            for attempt in range(_RETRIES):
                answer = self._ask(session, request, slot, cached, refusals)
                if answer is not None:
                    return answer
                time.sleep(0.1 * (attempt + 1))
        return Answered(request=request, tokens=(), refused=True, refusals=tuple(refusals))

    def _ask(
        self,
        session: requests.Session,
        request: Request,
        slot: int | None,
        cached: bool,
        refusals: list[str],
    ) -> Answered | None:
        drop = request.after == "drop" and cached
        body: dict[str, object] = {
            "prompt": prompt_ids(request.prompt.length, request.prompt.salt),
            "n_predict": request.prompt.answer,
            "temperature": 0,
            "seed": 1,
            "ignore_eos": True,
            "cache_prompt": cached,
            "return_tokens": True,
            "stream": drop,
            **({} if slot is None else {"id_slot": slot}),
            # Only for those asked alone: with others, log-probabilities depend on who was in the batch.
            **({} if cached else {"n_probs": 2}),
        }
        with (
            self._calls(),
            session.post(
                self.server.url + "/completion", json=body, timeout=_TIMEOUT, stream=drop
            ) as response,
        ):
            if response.status_code == 503:
                refusals.append(self._refusal(response))
                return None
            if response.status_code != 200:
                raise self.server.failed(
                    f"/completion answered {response.status_code}: {response.text[:300]}"
                )
            if drop:
                return self._dropped(response, request, refusals)
            value = response.json()
        return Answered(
            request=request,
            tokens=tuple(value["tokens"]),
            logprobs=tuple(p["logprob"] for p in value.get("completion_probabilities", ())),
            refusals=tuple(refusals),
        )

    def _refusal(self, response: requests.Response) -> str:
        text = str(response.json()["error"]["message"])
        if "Retry-After" not in response.headers:
            raise self.server.failed(f"a refusal without Retry-After: {text}")
        return text

    def _dropped(self, response: requests.Response, request: Request, refusals: list[str]) -> Answered:
        """The tokens of the first half of a stream, whose connection then ends."""
        tokens: list[int] = []
        for line in response.iter_lines():
            if line.startswith(b"error:"):
                refusals.append(line.decode(errors="replace"))
                break
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                refusals.append(str(event["error"].get("message")))
                break
            tokens += event.get("tokens", ())
            if len(tokens) * 2 >= request.prompt.answer:
                break
        return Answered(request=request, tokens=tuple(tokens), whole=False, refusals=tuple(refusals))

    @contextlib.contextmanager
    def _calls(self) -> Iterator[None]:
        """A broken connection names the process's end, if that is the reason."""
        try:
            yield
        except requests.RequestException as error:
            raise self.server.unanswered("a request", error) from error

    def slot(self, number: int, action: str, name: str | None = None) -> None:
        """Erases, saves or restores a slot."""
        json_body = {"filename": name} if name else {}
        with self._calls():
            answer = requests.post(
                f"{self.server.url}/slots/{number}?action={action}", json=json_body, timeout=_TIMEOUT
            )
        # Restoring needs pages: under a limit it may be refused.
        if answer.status_code != 200 and not (action == "restore" and self.elastic):
            raise self.server.failed(
                f"{action} of slot {number} answered {answer.status_code}: {answer.text[:300]}"
            )

    def do(self, action: Action, *, slot: int = 0, http: bool = True) -> None:
        """A step beside the requests."""
        if action == "erase":
            self.slot(slot, "erase")
        elif not self.elastic:
            return
        elif http:
            with self._calls():
                answer = requests.post(f"{self.server.url}/kvcached/{action}", json={}, timeout=_TIMEOUT)
            if answer.status_code != 200:
                if answer.status_code not in (409, 503):
                    raise self.server.failed(
                        f"/kvcached/{action} answered {answer.status_code}: {answer.text[:300]}"
                    )
                self._note(action, None)
                return
            self._note(action, int(answer.json()["freed_bytes"]))
        else:
            self.command(Command[action.upper()])

    def command(self, command: Command, *, wait_ms: int = 2000) -> None:
        """The same through the ledger, on every device."""
        for path in self._ledgers():
            with self._open(path) as ledger:
                for held in ledger.slots():
                    if not held.controlled:
                        continue
                    try:
                        self._note(command.name.lower(), ledger.command(held.slot, command, wait_ms=wait_ms))
                    except CallError:
                        self._note(command.name.lower(), None)

    def _note(self, action: str, freed: int | None) -> None:
        with self._lock:
            if freed is None:
                self.done.busy += 1
                return
            self.done.counts[action] = self.done.counts.get(action, 0) + 1
            if action == "sleep":
                self.done.slept += freed

    def _ledgers(self) -> list[Path]:
        """The ledger's file, and those of other devices beside it."""
        return list(self._ledger.parent.glob(f"{self._ledger.name}*"))

    def _open(self, path: Path) -> runtime.Ledger:
        return runtime.Ledger(path, library=library(self._install.root))

    def slots(self) -> tuple[Slot, ...]:
        """This side's slots in all its ledgers."""
        found: list[Slot] = []
        for path in self._ledgers():
            with self._open(path) as ledger:
                found += ledger.slots()
        return tuple(found)

    def held(self) -> Held:
        """What is held now. The caller has seen to it that nothing runs."""
        slots = self.slots()
        kinds = [sum(slot.kind_bytes[int(kind)] for slot in slots) for kind in Kind]
        proc = Path(f"/proc/{self.server.pid}")
        status = (proc / "status").read_text(encoding="ascii")
        rss = re.search(r"VmRSS:\s+(\d+) kB", status)
        if rss is None:
            raise CheckFailed(f"/proc/{self.server.pid}/status does not say what is resident: {status!r}")
        host = sum(slot.host_bytes for slot in slots)
        return Held(
            kinds=(kinds[0], kinds[1], kinds[2]),
            claim=sum(slot.claim for slot in slots),
            host=host,
            rss=int(rss[1]) * 1024 - host,
            maps=len((proc / "maps").read_text(encoding="utf-8", errors="replace").splitlines()),
            files=sum(1 for _ in (proc / "fd").iterdir()),
        )

    def empty(self) -> Held:
        """Erases every slot, wakes and trims; what is held then. KV memory may take a moment to go: pages
        that somebody just asked for ahead of need are given back by the idle rule."""
        for number in range(self.profile.slots):
            self.slot(number, "erase")
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self.elastic:
            self.command(Command.WAKE)
            self.command(Command.TRIM)
            held = self.held()
            if held.kinds[0] == 0 or time.monotonic() > deadline:
                return held
            time.sleep(0.1)
        return self.held()

    def peak(self) -> int:
        """The most bytes that the log ever showed as mapped."""
        return log_peak(self.server.log_text())


@contextlib.contextmanager
def start(
    install: Install,
    profile: Profile,
    folder: Path,
    *,
    name: str,
    device: Device,
    library_of: Install | None = None,
    elastic: bool = False,
    slots: int | None = None,
    limit: int | None = None,
    extra: dict[str, str] | None = None,
) -> Iterator[Side]:
    """A server of this profile, with all its slots or with `slots`. `limit`: bytes."""
    count = profile.slots if slots is None else slots
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    ledger = home / "ledger"
    # A unified cache is as long as all slots together, and then so is what one slot may use: also when it is alone.
    cells = profile.cells * (profile.slots if profile.unified else count)

    def argv(port: int) -> Sequence[str | Path]:
        binary = install.llama_server
        return (
            *(binary, "--model", profile.model, "--host", "127.0.0.1", "--port", str(port)),
            *("-np", str(count), "-c", str(cells), "-fa", "on" if profile.flash else "off"),
            *("-ctk", profile.kind, "-ctv", profile.kind, "-t", "1", "-tb", "1"),
            *("--kv-unified" if profile.unified else "--no-kv-unified", "--cache-ram", "0"),
            *if_known(binary, "--no-cache-idle-slots"),
            *("--offline", "--no-webui", "--log-verbosity", "4", "--slot-save-path", f"{home}/"),
            *(on_cpu(binary) if device == "cpu" else ("-ngl", "99")),
            *without_memory_map(binary),
            *profile.words,
        )

    env = {"KVCACHED_LEDGER": str(ledger)}
    if elastic:
        env |= {"OLLAMA_KVCACHED_ENABLED": "true", "OLLAMA_KVCACHED_HTTP": "1"}
        if limit is not None:
            # The user's setting is rounded to whole MiB here; it is what the text of a refusal names.
            env["OLLAMA_KVCACHED_MEMORY_GB"] = f"{max(1, limit // 2**20)}MiB"
    env |= extra or {}
    spec = ServerSpec(name=name, argv=argv, ready_path="/health", env=lambda port: env, start_seconds=240.0)
    with serve(spec, home) as server:
        yield Side(server, profile, library_of or install, ledger, elastic=elastic)
        if server.returncode() is not None:
            raise CheckFailed(f"{name} ended by itself", logs=server.logs())
