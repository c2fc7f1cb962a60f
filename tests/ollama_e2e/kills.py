"""kill -9: of runners that answer, load or sleep, and of `ollama serve`. Requests fail only with an error that says
so and that another try does not meet; nothing stays behind; the next requests are answered."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from kvpatch.smoke.ollama import loaded
from kvpatch.smoke.server import marked, run_mark
from tests.ollama_e2e import client, sides, verdict, watch
from tests.ollama_e2e.client import Failure, Outcome
from tests.ollama_e2e.questions import Question
from tests.ollama_e2e.setting import Setting
from tests.ollama_e2e.sides import Side
from tests.ollama_e2e.verdict import Evidence

_SOON = 15.0
_LONG = 1500  # tokens: an answer in whose midst there is time to kill
_VICTIM, _OTHER = "e2e-b", "e2e-c"
# Words of errors that a client may meet when a runner is killed: Ollama's own, and ours for one who waited.
CLEAR = (
    "model runner has unexpectedly stopped",
    "an error was encountered while running the model",
    "llama-server process has terminated",
    "llama-server process no longer running",
    "error reading llama-server response",
    "send the request again",
    "health resp",
)
# By these Ollama would take it for a full device, and unload every model.
_FULL = ("out of memory", "failed to allocate", "allocation failed", "not enough memory")


def clear(failure: Failure) -> bool:
    text = failure.text.lower()
    return any(words in text for words in CLEAR) and not any(words in text for words in _FULL)


class _Kills:
    """A server whose runners are killed."""

    def __init__(self, setting: Setting, side: Side) -> None:
        self.setting, self.side = setting, side
        self.problems: list[str] = []
        self.outcomes: list[Outcome] = []
        self.texts: dict[str, list[str]] = {}

    def long(self, model: str) -> Question:
        return Question(model=model, way="generate", salt=77, words=20, answer=_LONG, num_ctx=4096)

    def asks(self, model: str, *numbers: int) -> list[Callable[[], Outcome]]:
        return [partial(client.ask, self.side.url, self.setting.question(model, n)) for n in numbers]

    def victim(self, model: str = _VICTIM) -> int:
        """The model's process, once there is one."""
        deadline = time.monotonic() + _SOON
        while time.monotonic() < deadline:
            for child in self.side.children():
                if child.model == model:
                    return child.pid
            time.sleep(0.005)
        raise self.side.server.failed(f"no process of {model} within {_SOON:g} s")

    def kill(self, what: str, asked: Sequence[Callable[[], Outcome]], pid: Callable[[], int]) -> None:
        """Kills while these requests run; then the models must answer as ever."""
        found: list[Outcome] = []
        threads = [threading.Thread(target=lambda one=one: found.append(one())) for one in asked]
        for thread in threads:
            thread.start()
        killed = pid()
        os.kill(killed, signal.SIGKILL)
        for thread in threads:
            thread.join()
        self.judge(what, found)
        deadline = time.monotonic() + _SOON
        while any(slot.pid == killed for slot in self.side.slots()):
            if time.monotonic() > deadline:
                self.problems.append(f"{what}: the killed process still has a slot of the ledger")
                break
            time.sleep(0.05)
        for model in (_VICTIM, _OTHER):
            self.outcomes.append(client.ask(self.side.url, self.setting.question(model)))

    def judge(self, what: str, found: Sequence[Outcome], accept: Callable[[Failure], bool] = clear) -> None:
        failures = [outcome.failure for outcome in found if outcome.failure is not None]
        self.texts[what] = sorted({f"{failure.status} {failure.text}" for failure in failures})
        for failure in failures:
            if not accept(failure):
                self.problems.append(f"{what}: no clear error: status {failure.status}, {failure.text!r}")
        for outcome in found:
            if outcome.answer is not None and outcome.question in self.setting.wanted.answers:
                self.outcomes.append(outcome)

    def answering(self) -> None:
        """In the midst of an answer, with others queued for the same model, and one asking another."""
        self.outcomes.append(client.ask(self.side.url, self.setting.question(_VICTIM)))
        long: Callable[[], Outcome] = partial(client.ask, self.side.url, self.long(_VICTIM), stream=True)
        asked = [long, *self.asks(_VICTIM, 1, 2), *self.asks(_OTHER, 0)]

        def pid() -> int:
            time.sleep(0.7)
            return self.victim()

        self.kill("answering", asked, pid)
        if not any("20" in text[:3] or "50" in text[:3] for text in self.texts["answering"]):
            self.problems.append("answering: the request whose runner was killed did not fail")

    def loading(self) -> None:
        self.side.instance.command(self.side.server.port, "stop", _VICTIM)
        self.until("stopped", lambda: all(child.model != _VICTIM for child in self.side.children()))
        self.kill(
            "loading",
            self.asks(_VICTIM, 0, 1),
            self.victim,
        )

    def sleeping(self) -> None:
        """Nobody asks: whoever comes next is answered, or told to come again."""
        outcome = client.ask(self.side.url, self.setting.question(_VICTIM), keep_alive="200ms")
        self.outcomes.append(outcome)
        if not self.until("it sleeps", lambda: self.state(_VICTIM) == "asleep"):
            return
        self.kill("asleep", [], self.victim)

    def waking(self) -> None:
        outcome = client.ask(self.side.url, self.setting.question(_VICTIM), keep_alive="200ms")
        self.outcomes.append(outcome)
        if not self.until("it sleeps", lambda: self.state(_VICTIM) == "asleep"):
            return
        pid = self.victim()
        self.kill(
            "waking",
            self.asks(_VICTIM, 0, 1),
            lambda: pid,
        )

    def state(self, model: str) -> str | None:
        found = loaded(self.side.server).get(model)
        return None if found is None else str((found.kv or {}).get("state"))

    def until(self, what: str, holds: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _SOON
        while not holds():
            if time.monotonic() > deadline:
                self.problems.append(f"not within {_SOON:g} s: {what}")
                return False
            time.sleep(0.05)
        return True


def check(setting: Setting) -> Evidence:
    """Runners first, then `ollama serve` itself, twice: the second finds what the first left."""
    options = setting.options
    with sides.start(options.patched, options.folder, "kills", setting.members, setting.elastic()) as side:
        kills = _Kills(setting, side)
        for step in (kills.answering, kills.loading, kills.sleeping, kills.waking):
            step()
        log = side.server.log_text()
    problems = list(kills.problems)
    texts: dict[str, object] = dict(kills.texts)
    outcomes = list(kills.outcomes)
    problems += sides.left_behind(side.instance, frozenset())
    more, what = _serve_killed(setting, texts)
    problems += more
    outcomes += what
    found = verdict.tally(outcomes, setting.wanted.answers)
    return Evidence(
        name="kills",
        problems=(*verdict.answered(found, setting.wanted.answers), *problems),
        tally=found,
        events=watch.events(log),
        started=watch.children_logged(log, side.names),
        figures=texts,
    )


def _serve_killed(setting: Setting, texts: dict[str, object]) -> tuple[list[str], list[Outcome]]:
    """With models awake, asleep and answering."""
    options = setting.options
    problems: list[str] = []
    outcomes: list[Outcome] = []
    ended: list[float] = []
    with (
        contextlib.suppress(_Killed),
        sides.start(options.patched, options.folder, "killed", setting.members, setting.elastic()) as side,
    ):
        kills = _Kills(setting, side)
        outcomes.append(client.ask(side.url, setting.question(_OTHER), keep_alive="200ms"))
        kills.until("it sleeps", lambda: kills.state(_OTHER) == "asleep")
        found: list[Outcome] = []
        thread = threading.Thread(
            target=lambda: found.append(client.ask(side.url, kills.long(_VICTIM), stream=True))
        )
        thread.start()
        time.sleep(0.7)
        kills.victim()
        files = frozenset[str]().union(*(child.files for child in side.children()))
        os.kill(side.server.pid, signal.SIGKILL)
        thread.join()
        kills.judge("`ollama serve` answering", found, lambda failure: failure.status in (0, 200))
        if not found or found[0].failure is None:
            problems.append("the request whose server was killed did not fail")
        begin = time.monotonic()
        while (left := marked(run_mark())) and time.monotonic() - begin < _SOON:
            time.sleep(0.05)
        ended.append(time.monotonic() - begin)
        if left:
            problems.append(f"{_SOON:g} s after `ollama serve` was killed its children {left} still run")
        else:
            problems += sides.left_behind(side.instance, files)
        texts |= kills.texts
        problems += kills.problems
        raise _Killed
    if ended:
        texts["children ended after `ollama serve`"] = f"{ended[0]:.2f} s"
    # The next one finds the ledger as it is.
    with sides.start(options.patched, options.folder, "after", setting.members, setting.elastic()) as side:
        outcomes += [client.ask(side.url, setting.question(model)) for model in (_OTHER, _VICTIM)]
        charged = sum(slot.charge for slot in side.slots())
        if charged > setting.limit:
            problems.append(f"{charged} bytes are charged after a restart, the limit is {setting.limit}")
    return problems + sides.left_behind(side.instance, frozenset()), outcomes


class _Killed(Exception):
    """Leaves the block of a server that we killed ourselves."""
