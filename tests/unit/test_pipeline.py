"""Which stages run, in what order, and what is remembered."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from filelock import FileLock

from kvpatch import pipeline
from kvpatch.errors import CompileError, KvpatchError, UsageError
from kvpatch.events import Silent
from kvpatch.plan import Plan
from kvpatch.stages.context import Context

MakePlan = Callable[..., Plan]


class Recorder(Silent):
    def __init__(self) -> None:
        self.finished: list[tuple[str, str]] = []

    def stage_finished(self, stage: str, status: str, seconds: float) -> None:
        self.finished.append((stage, status))


class World:
    """Stand-ins for the six stages: each has an input that can change, and may be told to fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.inputs: dict[str, Any] = dict.fromkeys(pipeline.NAMES, 0)
        self.fail: str | None = None
        self.products_there = True

    def stages(self) -> tuple[pipeline.Stage, ...]:
        return tuple(self._stage(name) for name in pipeline.NAMES)

    def _stage(self, name: str) -> pipeline.Stage:
        def run(context: Context) -> dict[str, Any]:
            if self.fail == name:
                raise CompileError(f"{name} broke")
            self.ran.append(name)
            return {"saw": sorted(context.values)}

        return pipeline.Stage(
            name=name,
            run=run,
            own=lambda context: self.inputs[name],
            fresh=lambda context, value: self.products_there or name != "compile",
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(pipeline, "STAGES", world.stages())
    return world


ALL = list(pipeline.NAMES)


def test_the_first_run_does_everything_and_the_second_nothing(world: World, make_plan: MakePlan) -> None:
    recorder = Recorder()
    outcome = pipeline.run(make_plan(), recorder)
    assert world.ran == ALL
    assert outcome.values["manifest"]["saw"] == sorted(set(ALL) - {"manifest"})
    world.ran.clear()
    again = pipeline.run(make_plan(), recorder)
    assert world.ran == []
    assert again.values == outcome.values
    assert recorder.finished[-6:] == [(name, "fresh") for name in ALL]


def test_a_changed_patch_runs_the_source_stages_too(world: World, make_plan: MakePlan) -> None:
    pipeline.run(make_plan(), Silent())
    world.ran.clear()
    world.inputs["apply"] = 1
    pipeline.run(make_plan(), Silent())
    assert world.ran == ALL


def test_a_changed_smoke_input_runs_smoke_alone(world: World, make_plan: MakePlan) -> None:
    pipeline.run(make_plan(), Silent())
    world.ran.clear()
    world.inputs["smoke"] = 1
    pipeline.run(make_plan(), Silent())
    assert world.ran == ["smoke", "manifest"]


def test_missing_products_are_made_again_from_sources_known_to_be_right(
    world: World, make_plan: MakePlan
) -> None:
    pipeline.run(make_plan(), Silent())
    world.ran.clear()
    world.products_there = False
    pipeline.run(make_plan(), Silent())
    assert world.ran == ALL


def test_a_failure_keeps_what_was_done(world: World, make_plan: MakePlan) -> None:
    world.fail = "smoke"
    with pytest.raises(CompileError):
        pipeline.run(make_plan(), Silent())
    world.fail = None
    world.ran.clear()
    pipeline.run(make_plan(), Silent())
    assert world.ran == ["smoke", "manifest"]


def test_a_failed_stage_does_not_stay_fresh_from_before(world: World, make_plan: MakePlan) -> None:
    pipeline.run(make_plan(), Silent())
    world.inputs["compile"] = 1
    world.fail = "compile"
    with pytest.raises(CompileError):
        pipeline.run(make_plan(), Silent())
    # Back to the inputs of the first run: its products may be half overwritten, so nothing from compile on is trusted.
    world.inputs["compile"] = 0
    world.fail = None
    world.ran.clear()
    pipeline.run(make_plan(), Silent())
    assert world.ran == ALL


def test_until_stops_early_and_from_forces(world: World, make_plan: MakePlan) -> None:
    pipeline.run(make_plan(), Silent(), last="generate")
    assert world.ran == ["fetch", "apply", "generate"]
    with pytest.raises(UsageError, match="compile has not run"):
        pipeline.run(make_plan(), Silent(), first="smoke")
    pipeline.run(make_plan(), Silent())
    world.ran.clear()
    pipeline.run(make_plan(), Silent(), first="compile")
    assert world.ran == ["compile", "smoke", "manifest"]
    with pytest.raises(UsageError, match="no such stage"):
        pipeline.run(make_plan(), Silent(), last="nonsense")
    with pytest.raises(UsageError, match="lies after"):
        pipeline.run(make_plan(), Silent(), first="smoke", last="apply")


def test_steps_tell_what_run_would_do_and_do_nothing(world: World, make_plan: MakePlan) -> None:
    plan = make_plan()
    assert [step.fresh for step in pipeline.steps(plan, Silent())] == [False] * 6
    assert not plan.workspace.exists()
    pipeline.run(plan, Silent())
    world.inputs["smoke"] = 1
    assert [step.fresh for step in pipeline.steps(plan, Silent())] == [True, True, True, True, False, False]


def test_stock_and_patched_do_not_share_their_record(world: World, make_plan: MakePlan) -> None:
    pipeline.run(make_plan(), Silent())
    world.ran.clear()
    pipeline.run(make_plan(stock=True), Silent())
    assert world.ran == ALL
    world.ran.clear()
    pipeline.run(make_plan(), Silent())
    assert world.ran == []


def test_a_torn_state_file_means_doing_it_again(world: World, make_plan: MakePlan) -> None:
    plan = make_plan()
    pipeline.run(plan, Silent())
    (state,) = plan.workspace.glob("state-*.json")
    state.write_text(state.read_text(encoding="utf-8")[:50], encoding="utf-8")
    world.ran.clear()
    pipeline.run(plan, Silent())
    assert world.ran == ALL


def test_trees_that_another_variant_used_since_are_not_taken_for_ours(
    world: World, make_plan: MakePlan
) -> None:
    pipeline.run(make_plan(), Silent())
    pipeline.run(make_plan(stock=True), Silent(), last="generate")
    world.ran.clear()
    with pytest.raises(UsageError, match="used the trees since"):
        pipeline.run(make_plan(), Silent(), first="compile")
    assert world.ran == []
    assert [s.fresh for s in pipeline.steps(make_plan(), Silent(), last="generate")] == [False] * 3
    pipeline.run(make_plan(), Silent(), last="generate")
    assert world.ran == ["fetch", "apply", "generate"]
    world.ran.clear()
    pipeline.run(make_plan(), Silent(), last="generate")
    pipeline.run(make_plan(), Silent(), last="fetch")
    assert world.ran == []


def test_from_apply_starts_from_upstream_s_trees(world: World, make_plan: MakePlan) -> None:
    pipeline.run(make_plan(), Silent())
    world.ran.clear()
    pipeline.run(make_plan(), Silent(), first="apply", last="generate")
    assert world.ran == ["fetch", "apply", "generate"]


def test_a_folder_of_somebody_else_is_refused_before_anything_runs(world: World, make_plan: MakePlan) -> None:
    plan = make_plan()
    plan.out.mkdir()
    (plan.out / "cat.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cat\.jpg"):
        pipeline.run(plan, Silent())
    assert world.ran == []
    pipeline.run(plan, Silent(), last="generate")


@pytest.mark.parametrize(("stage", "code"), [("fetch", 4), ("apply", 5), ("generate", 6), ("compile", 7)])
def test_a_full_disk_is_no_bug(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, stage: str, code: int
) -> None:
    def full(context: Context) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    def fine(context: Context) -> dict[str, Any]:
        return {}

    stages = tuple(replace(s, run=full if s.name == stage else fine) for s in pipeline.STAGES)
    monkeypatch.setattr(pipeline, "STAGES", stages)
    plan = make_plan()
    with pytest.raises(KvpatchError, match="No space left on device: /somewhere") as caught:
        pipeline.run(plan, Silent(), last="compile")
    assert caught.value.exit_code == code
    assert caught.value.hint


def test_every_stage_has_a_log_with_its_details_and_its_error(make_plan: MakePlan, world: World) -> None:
    plan = make_plan()
    Context(plan=plan, events=Silent()).detail("smoke", "from an earlier run")
    world.fail = "smoke"
    with pytest.raises(CompileError):
        pipeline.run(plan, Silent())
    assert (plan.workspace / "logs" / "smoke.log").read_text(encoding="utf-8") == "error: smoke broke\n"


def test_a_second_build_says_that_it_waits(make_plan: MakePlan, world: World) -> None:
    plan = make_plan()
    said: list[str] = []
    lock = FileLock(plan.workspace / "lock")

    class Listener(Silent):
        def warning(self, text: str) -> None:
            said.append(text)
            lock.release()

    plan.workspace.mkdir(parents=True)
    lock.acquire()
    pipeline.run(plan, Listener())
    assert world.ran == ALL
    assert "waiting" in said[0]
