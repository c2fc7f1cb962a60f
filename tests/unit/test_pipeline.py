"""Which stages run, in what order, and what is remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvpatch import pipeline
from kvpatch.errors import CompileError, UsageError
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
