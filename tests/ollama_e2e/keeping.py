"""keep_alive and `ollama stop`, one after the other: what sleeps, what is unloaded, and when."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvpatch.smoke.ollama import loaded
from tests.ollama_e2e import client, sides, traffic, verdict, watch
from tests.ollama_e2e.client import Outcome
from tests.ollama_e2e.setting import Setting
from tests.ollama_e2e.sides import Side
from tests.ollama_e2e.verdict import Evidence

_ASLEEP_SECONDS = 4
_SOON = 15.0
_FIRST, _SECOND, _PINNED = "e2e-b", "e2e-c", traffic.PINNED


class _Keeping:
    """A server whose models are asked one at a time."""

    def __init__(self, setting: Setting, side: Side) -> None:
        self.setting, self.side = setting, side
        self.outcomes: list[Outcome] = []
        self.problems: list[str] = []
        self.figures: dict[str, object] = {}

    def ask(self, model: str, keep_alive: str | int | None, number: int = 0) -> None:
        question = self.setting.question(model, number)
        self.outcomes.append(client.ask(self.side.url, question, keep_alive=keep_alive))

    def pid(self, model: str) -> int | None:
        return next((child.pid for child in self.side.children() if child.model == model), None)

    def state(self, model: str) -> str | None:
        """By /api/ps; None when it is not there."""
        found = loaded(self.side.server).get(model)
        return None if found is None else str((found.kv or {}).get("state"))

    def until(self, what: str, holds: Callable[[], bool], seconds: float = _SOON) -> bool:
        """Whether it came to hold in time, and after how long; else it is a problem."""
        begin = time.monotonic()
        while not holds():
            if time.monotonic() - begin > seconds:
                states = {name: self.state(name) for name in loaded(self.side.server)}
                self.problems.append(f"not within {seconds:g} s: {what}; loaded: {states}")
                return False
            time.sleep(0.05)
        self.figures[what] = f"after {time.monotonic() - begin:.2f} s"
        return True

    def gone(self, model: str) -> bool:
        return self.state(model) is None and self.pid(model) is None

    def stop(self, model: str) -> None:
        self.side.instance.command(self.side.server.port, "stop", model)

    def zero(self) -> None:
        self.ask(_FIRST, 0)
        self.until("with keep_alive 0 a model is unloaded", lambda: self.gone(_FIRST))

    def short(self) -> None:
        self.ask(_FIRST, "500ms")
        pid = self.pid(_FIRST)
        if not self.until("after a short keep_alive a model sleeps", lambda: self.state(_FIRST) == "asleep"):
            return
        shown = self.side.instance.command(self.side.server.port, "ps")
        line = next((line for line in shown.splitlines() if line.startswith(_FIRST)), "")
        if "asleep" not in line.lower() or "100% CPU" in line:
            self.problems.append(f"`ollama ps` of a sleeper: {line!r}")
        self.ask(_FIRST, "500ms", 1)
        if self.pid(_FIRST) != pid:
            self.problems.append("a model that slept was loaded anew")
        self.until("it sleeps again", lambda: self.state(_FIRST) == "asleep")
        begin = time.monotonic()
        if self.until(
            "a sleeper is unloaded after its time", lambda: self.gone(_FIRST), _ASLEEP_SECONDS + _SOON
        ):
            slept = time.monotonic() - begin
            if slept < _ASLEEP_SECONDS - 2:
                self.problems.append(f"a sleeper was unloaded after {slept:.1f} s, not {_ASLEEP_SECONDS}")

    def stopped(self) -> None:
        self.ask(_FIRST, "10m")
        self.stop(_FIRST)
        self.until("`ollama stop` unloads a model", lambda: self.gone(_FIRST))
        self.ask(_FIRST, "500ms")
        if self.until("a model sleeps", lambda: self.state(_FIRST) == "asleep"):
            self.stop(_FIRST)
            self.until("`ollama stop` unloads a sleeper", lambda: self.gone(_FIRST))
        self.ask(_FIRST, "10m", 1)

    def pinned(self) -> None:
        """keep_alive -1 may sleep for others, and stays."""
        self.ask(_PINNED, -1)
        pid = self.pid(_PINNED)
        for member in self.setting.members:
            if member.name != _PINNED:
                self.ask(member.name, "10m")
        if self.until(
            "for others' sake a model with keep_alive -1 sleeps", lambda: self.state(_PINNED) == "asleep"
        ):
            time.sleep(_ASLEEP_SECONDS + 2)
            if self.state(_PINNED) is None or self.pid(_PINNED) != pid:
                self.problems.append("a model with keep_alive -1 was unloaded")
        self.ask(_PINNED, -1, 1)
        if self.pid(_PINNED) != pid:
            self.problems.append("a model with keep_alive -1 was loaded anew")

    def emptied(self) -> None:
        for name in loaded(self.side.server):
            self.stop(name)
        self.until(
            "with all stopped nothing is left",
            lambda: not loaded(self.side.server) and not self.side.children(),
        )
        left = [slot for slot in self.side.slots() if slot.charge]
        if left:
            self.problems.append(f"charges are left with no model loaded: {left}")


def check(setting: Setting) -> Evidence:
    """One server, whose sleepers end after a few seconds."""
    options = setting.options
    settings = setting.elastic(**{sides.SLEEP: str(_ASLEEP_SECONDS)})
    with sides.start(options.patched, options.folder, "keeping", setting.members, settings) as side:
        keeping = _Keeping(setting, side)
        for step in (keeping.zero, keeping.short, keeping.stopped, keeping.pinned, keeping.emptied):
            step()
        log = side.server.log_text()
    found = verdict.tally(keeping.outcomes, setting.wanted.answers)
    problems = [*verdict.answered(found, setting.wanted.answers), *keeping.problems]
    problems += sides.left_behind(side.instance, frozenset())
    return Evidence(
        name="keeping",
        problems=tuple(problems),
        tally=found,
        events=watch.events(log),
        started=watch.children_logged(log, side.names),
        figures=keeping.figures,
    )
