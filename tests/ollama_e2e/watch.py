"""Looking at a server while others ask it: /api/ps, its children, its ledger and its log."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import requests

from kvpatch.errors import KvpatchError
from tests.ollama_e2e.sides import Side, open_files

_EVERY = 0.25
_PS_TIMEOUT = 30.0
# What the log says of decisions: one line each, with the model's name.
_EVENTS = {
    "sleep": "kvcached: put to sleep",
    "wake": "kvcached: woke",
    "wait": "kvcached: waiting for room",
    "trim": "kvcached: trimmed",
    "unload": "kvcached: unload",
    "admit": "kvcached: admitted",
    "refuse": "refused",
    "start": "starting llama-server",
}
_FIELDS = ("state", "kv_mapped", "kv_reserved", "weights_mapped", "context_bytes", "host_bytes", "limit")


@dataclass(slots=True)
class Seen:
    """What was seen so far. `born`: processes of each model; `states`: how often each was seen in /api/ps; `awake`:
    most models that had weights mapped at one time; `peak`: most that was charged; `over`: longest time, in
    seconds, that more than the limit was; `slowest`: answer of /api/ps; `problems`: what /api/ps should not have
    shown."""

    born: dict[str, set[int]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    states: dict[str, int] = field(default_factory=dict)
    slept: set[str] = field(default_factory=set)
    awake: int = 0
    peak: int = 0
    over: float = 0.0
    slowest: float = 0.0
    looks: int = 0
    problems: set[str] = field(default_factory=set)


class Watch:
    """Looks four times a second, in a thread of its own, while the block runs."""

    def __init__(self, side: Side, limit: int | None) -> None:
        self.seen = Seen()
        self._side, self._limit = side, limit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._over_since: float | None = None
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[Seen]:
        self._thread.start()
        try:
            yield self.seen
        finally:
            self._stop.set()
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(_EVERY):
                self.look()
        except BaseException as error:
            self._error = error

    def look(self) -> None:
        self.seen.looks += 1
        for child in self._side.children():
            self.seen.born.setdefault(child.model, set()).add(child.pid)
            self.seen.files |= child.files
        with contextlib.suppress(OSError):
            self.seen.files |= open_files(self._side.server.pid, self._side.instance.folder)
        begin = time.monotonic()
        try:
            shown = requests.get(self._side.url + "/api/ps", timeout=_PS_TIMEOUT).json()["models"]
        except requests.RequestException as error:
            # A killed server is the kill tests' matter: there this goes unread.
            self.seen.problems.add(f"/api/ps was not answered: {type(error).__name__}")
            return
        self.seen.slowest = max(self.seen.slowest, time.monotonic() - begin)
        if self._limit is not None:
            self._models(shown)
            self._ledger()

    def _models(self, shown: list[dict[str, object]]) -> None:
        awake = 0
        for model in shown:
            name = str(model["name"]).removesuffix(":latest")
            kv = model.get("kvcached")
            if not isinstance(kv, dict):
                self.seen.problems.add(f"/api/ps shows no `kvcached` of {name}")
                continue
            missing = [key for key in _FIELDS if key not in kv]
            if missing:
                self.seen.problems.add(f"/api/ps: `kvcached` lacks {', '.join(missing)}")
            state = str(kv.get("state"))
            self.seen.states[state] = self.seen.states.get(state, 0) + 1
            if state == "asleep":
                self.seen.slept.add(name)
                if kv.get("weights_mapped") or kv.get("kv_mapped"):
                    self.seen.problems.add(f"/api/ps: a model asleep has memory mapped: {kv}")
            elif kv.get("weights_mapped"):
                awake += 1
        self.seen.awake = max(self.seen.awake, awake)

    def _ledger(self) -> None:
        assert self._limit is not None
        try:
            charged = sum(slot.charge for slot in self._side.slots())
        except KvpatchError as error:
            self.seen.problems.add(f"the ledger cannot be read: {error}")
            return
        self.seen.peak = max(self.seen.peak, charged)
        now = time.monotonic()
        # A claim is written down before it is known to fit, and withdrawn: for a moment it shows.
        if charged <= self._limit:
            self._over_since = None
        elif self._over_since is None:
            self._over_since = now
        else:
            self.seen.over = max(self.seen.over, now - self._over_since)


def events(log: str, since: int = 0) -> dict[str, int]:
    """How many lines of the log, from this character on, tell of each kind of decision."""
    counts = dict.fromkeys(_EVENTS, 0)
    for line in log[since:].splitlines():
        for kind, words in _EVENTS.items():
            if words in line and (kind != "refuse" or "kvcached: " in line):
                counts[kind] += 1
    return counts


def children_logged(log: str, digests: Mapping[str, str]) -> dict[str, int]:
    """How often a child was started for each model, by the log. A look may miss one that lived shorter."""
    counts: dict[str, int] = {}
    for line in log.splitlines():
        if _EVENTS["start"] in line and (match := re.search(r"--model \S*sha256-([0-9a-f]+)", line)):
            name = digests.get(match[1], match[1])
            counts[name] = counts.get(name, 0) + 1
    return counts
