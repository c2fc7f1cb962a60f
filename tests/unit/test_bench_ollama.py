"""The benchmarks of Ollama without an Ollama: models in a store, what a log says, what counts as awake, bounds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvpatch import smoke
from kvpatch.bench import device, models, ollama_capacity, ollama_models, ollama_servers, ollama_switch
from kvpatch.bench.figures import Report
from kvpatch.bench.ollama_models import Member, Store
from kvpatch.bench.ollama_pools import Look
from kvpatch.bench.ollama_servers import Answer, milliseconds
from kvpatch.errors import UsageError
from kvpatch.smoke.report import CheckFailed

_COUNT = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return ollama_models.store(folder / "models", models.TINY, _COUNT, bases=folder)


def test_models_of_a_store_are_files_of_their_own_under_their_digest(store: Store) -> None:
    assert len({member.digest for member in store.members}) == _COUNT
    for member in store.members:
        assert hashlib.sha256(member.file.read_bytes()).hexdigest() == member.digest
        manifest = store.folder / "manifests" / member.name / "latest"
        body = json.loads(manifest.read_text(encoding="utf-8"))
        (layer,) = body["layers"]
        assert (layer["digest"], layer["size"]) == (f"sha256:{member.digest}", member.bytes)
        config = store.folder / "blobs" / body["config"]["digest"].replace(":", "-")
        assert hashlib.sha256(config.read_bytes()).hexdigest() == body["config"]["digest"][7:]
    assert not list((store.folder / "blobs").glob("part-*"))


def test_models_differ_in_their_name_and_last_norm_alone(store: Store) -> None:
    readers: list[Any] = [gguf.GGUFReader(member.file) for member in store.members]
    names = [bytes(reader.fields["general.name"].parts[-1]) for reader in readers]
    assert len(set(names)) == _COUNT
    first, second = ({t.name: t.data for t in reader.tensors} for reader in readers[:2])
    unlike = {name for name in first if not np.array_equal(first[name], second[name])}
    assert unlike == {"output_norm.weight"}
    assert set(np.unique(first["output_norm.weight"])) == {-1.0, 1.0}


def test_a_store_is_used_again_but_for_what_was_cut_short(store: Store) -> None:
    times = [member.file.stat().st_mtime_ns for member in store.members]
    with store.members[1].file.open("r+b") as file:
        file.truncate(100)
    again = ollama_models.store(store.folder, models.TINY, _COUNT, bases=store.folder.parent)
    assert again == store
    found = [member.file.stat().st_mtime_ns for member in again.members]
    assert [a == b for a, b in zip(times, found, strict=True)] == [True, False, True]
    assert again.members[1].bytes == again.members[0].bytes


def test_models_have_numbers_of_two_digits(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    models.write(path, models.TINY)
    for number in (0, 100):
        with pytest.raises(UsageError, match=f"model number {number}"):
            ollama_models.vary(path, number)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("87.3ms", 87.3), ("1.5s", 1500.0), ("1m2.5s", 62500.0), ("250µs", 0.25), ('"2ms"', 2.0)],
)
def test_durations_as_go_writes_them(text: str, expected: float) -> None:
    assert milliseconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "12", "fast", "3 ms", "5msx"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        milliseconds(text)


class _Server:
    """A server as far as its log is read and a failure is made."""

    name = "ollama-on"
    port = 1

    def __init__(self, log: str = "") -> None:
        self.log = log

    def log_text(self) -> str:
        return self.log

    def returncode(self) -> int | None:
        return None

    def logs(self) -> dict[str, str]:
        return {}

    def failed(self, detail: str) -> CheckFailed:
        return CheckFailed(detail)

    def descendants(self) -> tuple[int, ...]:
        return ()


_LOG = """\
time=x level=INFO msg="starting llama-server" cmd="..."
time=x level=INFO msg="kvcached: put to sleep" model=a/b/m-1:latest reason=room need="5 MB" took=24.5ms
time=x level=INFO msg="kvcached: woke" model=a/b/m-1:latest need="5 MB" waited=1ms took=80ms
time=x level=INFO msg="kvcached: put to sleep" model=a/b/m-1:latest reason=room need="5 MB" took=12ms
"""


def _setup(store: Store, *, budget: int = 1000) -> ollama_servers.Setup:
    root = store.folder
    install = smoke.Install(
        root=root, kind="ollama", llama_server=root / "llama-server", ollama=root / "ollama"
    )
    return ollama_servers.Setup(
        stock=install, patched=install, store=store, device=device.Cpu(), work=root, budget=budget
    )


def test_the_log_tells_how_often_and_how_long(store: Store) -> None:
    server: Any = _Server(_LOG)
    one = ollama_servers.Talker(_setup(store), "on", server)
    assert [one.did(kind) for kind in ("sleep", "wake", "unload", "start")] == [2, 1, 0, 1]
    assert one.took("sleep") == {"a/b/m-1": [24.5, 12.0]}
    assert one.took("wake") == {"a/b/m-1": [80.0]}
    was = one.history()
    assert one.history() == was
    server.log += _LOG.splitlines()[2]
    assert one.history() != was


def test_only_the_patched_side_is_told_of_the_budget(store: Store) -> None:
    setup = _setup(store, budget=20_000_000_000)
    stock, on = setup.instance("stock").settings, setup.instance("on").settings
    assert not [name for name in stock if "KVCACHED" in name]
    assert on["OLLAMA_KVCACHED_MEMORY_GB"] == "20.000000000"
    assert {k: v for k, v in on.items() if "KVCACHED" not in k} == stock


@pytest.mark.parametrize(
    ("kv", "expected"),
    [
        ({"state": "awake", "weights_mapped": 600, "kv_mapped": 1}, True),
        ({"state": "asleep", "weights_mapped": 600, "kv_mapped": 1}, False),
        ({"state": "awake", "weights_mapped": 400, "kv_mapped": 1}, False),
        ({"state": "awake", "weights_mapped": 600, "kv_mapped": 0}, False),
        ({"state": "awake"}, False),
        ({}, False),
    ],
)
def test_awake_is_with_weights_and_tokens_mapped(kv: dict[str, object], expected: bool) -> None:
    assert ollama_capacity.awake(kv, 1000) is expected


class _Talker:
    """Models, of which `fits` are awake at once: one more puts the one that was asked longest ago to sleep."""

    def __init__(self, setup: ollama_servers.Setup, side: str, fits: int) -> None:
        self.setup, self.side, self.fits = setup, side, fits
        self.server = _Server("out of memory")
        self.order: list[str] = []
        self.seen: list[str] = []
        self.done = 0
        self.forgets = False

    def ask(
        self, member: Member, prompt: str, count: int, context: int, *, keep: str | None = None
    ) -> Answer:
        if member.name not in self.order[-self.fits :]:
            self.done += 1
        self.order = [name for name in self.order if name != member.name] + [member.name]
        self.seen.append(prompt)
        text = f"{member.name} {prompt[:9]} {len(self.seen) if self.forgets else ''}"
        return Answer(text=text, first_ms=2.0, whole_ms=4.0, tokens=count, rate=100.0)

    def states(self) -> dict[str, dict[str, object]]:
        awake, size = self.order[-self.fits :], self.setup.store.members[0].bytes
        if self.side == "stock":
            return {name: {} for name in awake}
        rows: dict[str, dict[str, object]] = {}
        for name in self.order:
            up = name in awake
            rows[name] = {
                "state": "awake" if up else "asleep", "weights_mapped": size if up else 0, "kv_mapped": 10,
                "kv_reserved": 400, "context_bytes": 0, "charge": 100,
            }  # fmt: skip
        return rows

    def history(self) -> tuple[object, ...]:
        return (self.done,)

    def did(self, kind: str) -> int:
        return self.done

    def wait_state(self, members: tuple[Member, ...], state: str) -> None:
        assert {member.name for member in members} <= set(self.order)

    def unload(self, members: tuple[Member, ...]) -> None:
        self.order = []

    def children(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(("fits", "expected"), [(1, 1), (2, 2), (3, 3), (9, 3)])
@pytest.mark.parametrize("side", ["stock", "on"])
def test_as_many_are_awake_as_answer_without_a_wake(
    store: Store, monkeypatch: pytest.MonkeyPatch, side: str, fits: int, expected: int
) -> None:
    look = Look(ledger=70, contexts=20, driver=100)
    monkeypatch.setattr(ollama_capacity, "look", lambda setup, one: look)
    setup = _setup(store)
    talker: Any = _Talker(setup, side, fits)
    found = ollama_capacity._Found()
    ollama_capacity._measure(setup, replace(ollama_capacity.SHORT, most=_COUNT), talker, found, 0)
    assert found.awake == [float(expected)]
    assert found.tried == min(fits + 1, _COUNT)
    assert ("one more than fits" in found.top) == (side == "on" and fits < _COUNT)


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ("m was answered 500: model requires more system memory", True),
        ("m was answered 503: raise the limit", True),
        ("m was answered 404: model not found, memory", False),
        ("ollama-on: a completion broke off, though the process still runs", False),
        ("m does not repeat its answer", False),
    ],
)
def test_only_a_refusal_for_memory_ends_the_count(detail: str, expected: bool) -> None:
    assert ollama_capacity.refused_for_memory(detail) is expected


def test_who_answers_otherwise_is_noticed(store: Store) -> None:
    setup = _setup(store)
    talker: Any = _Talker(setup, "on", 9)
    talker.forgets = True
    found = ollama_capacity._Found()
    with pytest.raises(CheckFailed, match="does not repeat its answer"):
        ollama_capacity._measure(setup, ollama_capacity.SHORT, talker, found, 0)


def test_two_that_do_not_stay_awake_are_no_pair(store: Store) -> None:
    setup = _setup(store)
    plan = ollama_switch.SHORT
    pair = ollama_switch._Pairs(plan.context)
    stays: Any = _Talker(setup, "on", 2)
    pair.measure(setup, plan, stays, 2)
    assert (len(pair.alone["on"]), len(pair.both["on"]), pair.loads["on"]) == (4, 4, 0)
    assert pair.added("on") == 0.0
    sleeps: Any = _Talker(setup, "on", 1)
    with pytest.raises(CheckFailed, match="put to sleep, woken or loaded"):
        pair.measure(setup, plan, sleeps, 2)


def test_top_and_driver_are_apart_by_a_part_of_what_was_taken_since() -> None:
    look = Look(ledger=80, contexts=18, driver=1100)
    assert look.gap(1000) == pytest.approx(0.02)
    assert look.gap(1001) == pytest.approx(1 / 99)
    assert look.gap(1100) == 1.0


def test_on_a_cpu_the_number_awake_is_held_against_full_reservations(store: Store) -> None:
    found = {side: ollama_capacity._Found() for side in ("stock", "on")}
    for side, count in (("stock", 3.0), ("on", 5.0)):
        one = found[side]
        one.awake, one.each, one.empty, one.unloaded = [count], [9.0], [0.0], [0.0]
    on = found["on"]
    on.asleep, on.tried = [1.0], 6
    on.kinds = {"charge": [100.0], "kv_mapped": [10.0], "kv_reserved": [400.0]}
    for budget, bound, holds in ((600, 3.0, True), (1000, 6.0, False)):
        report = Report(kind="ollama-capacity", facts={})
        ollama_capacity._show(_setup(store, budget=budget), ollama_capacity.SHORT, report, found)
        (only,) = report.bounds
        assert (only.value, only.limit, only.holds) == (5.0, bound, holds)


class _Gpu(device.Cpu):
    """A card as far as the report asks for it."""

    name = "cuda"


@pytest.mark.parametrize(
    ("fits", "driver", "missed"),
    [
        (3, 1100, []),
        (2, 1100, ["models awake at once"]),
        (3, 1200, ["kvpatch top, all awake", "kvpatch top, all asleep"]),
    ],
)
def test_on_a_gpu_the_number_awake_is_held_against_stock_and_top_against_the_driver(
    store: Store, monkeypatch: pytest.MonkeyPatch, fits: int, driver: int, missed: list[str]
) -> None:
    look = Look(ledger=80, contexts=20, driver=driver)
    monkeypatch.setattr(ollama_capacity, "look", lambda setup, one: look)
    monkeypatch.setattr(ollama_capacity, "driver_used", lambda setup: driver)
    setup = replace(_setup(store), device=_Gpu())
    found = {side: ollama_capacity._Found() for side in ("stock", "on")}
    for side, count in (("stock", 1), ("on", fits)):
        talker: Any = _Talker(setup, side, count)
        ollama_capacity._measure(
            setup, replace(ollama_capacity.SHORT, most=_COUNT), talker, found[side], 1000
        )
    report = Report(kind="ollama-capacity", facts={})
    ollama_capacity._show(setup, ollama_capacity.SHORT, report, found)
    assert [bound.name.partition(": ")[0] for bound in report.missed] == missed
    rows = {row.name: row.sides for row in report.rows}
    assert rows["device use, each, awake and idle"]["stock"].median == driver - 1000
    assert rows["awake at once"]["on"].median == fits


class _Crowd(_Talker):
    """As _Talker; each request takes `ms`, and its model sleeps before it where `wakes`."""

    def __init__(self, setup: ollama_servers.Setup, side: str, ms: float, *, wakes: bool) -> None:
        super().__init__(setup, side, 9)
        self.ms, self.woken, self.wakes, self.done = ms, 0, wakes, 5

    def ask(
        self, member: Member, prompt: str, count: int, context: int, *, keep: str | None = None
    ) -> Answer:
        self.woken += self.wakes
        return replace(super().ask(member, prompt, count, context, keep=keep), first_ms=self.ms)

    def did(self, kind: str) -> int:
        return self.woken if kind == "wake" else 5

    def took(self, kind: str) -> dict[str, list[float]]:
        return {member.name: [30.0, 20.0] for member in self.setup.store.members}


@pytest.mark.parametrize(
    ("ms", "wakes", "missed"),
    [
        (154.0, True, []),
        (156.0, True, ["more models than fit awake, switch to first token"]),
        (154.0, False, None),
    ],
)
def test_a_switch_may_cost_its_copies(
    store: Store, monkeypatch: pytest.MonkeyPatch, ms: float, wakes: bool, missed: list[str] | None
) -> None:
    class Cpu(device.Cpu):
        def rates(self) -> list[float]:
            return [5e10]

    # 4.8 GB and twice 0.1 GB at 50 GB/s are 100 ms: 115 and 40 more.
    monkeypatch.setattr(ollama_switch, "asleep_bytes", lambda setup, one: ([4_800_000_000], [100_000_000]))
    setup = replace(_setup(store), device=Cpu())
    on: Any = _Crowd(setup, "on", ms, wakes=wakes)
    stock: Any = _Crowd(setup, "stock", 5000.0, wakes=False)
    report = Report(kind="ollama-switch", facts={})
    plan = replace(ollama_switch.SHORT, crowd=_COUNT)
    ollama_switch._crowd(setup, plan, report, {"stock": stock, "on": on}, lambda line: None)
    if missed is None:
        assert [bound.name for bound in report.missed] == ["requests whose model slept, of all"]
        assert "nothing was woken" in report.notes[0]
    else:
        assert len(report.bounds) == 2
        assert [bound.name for bound in report.missed] == missed
    rows = {row.name: row.sides for row in report.rows}
    assert rows["request to first token"]["stock"].median == 5000.0
    assert rows["the first sleep of each"]["on"].median == 30.0
