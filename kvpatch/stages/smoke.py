"""Stage smoke: run what was built."""

from __future__ import annotations

from kvpatch import smoke
from kvpatch.stages.context import Context, Value


def run(context: Context) -> Value:
    """Smoke-test the output folder. Raises SmokeError with the report when a check fails."""
    plan = context.plan
    install = smoke.Install.detect(plan.out)
    report = smoke.run(
        install,
        workdir=plan.workspace / "smoke",
        progress=lambda text: context.detail("smoke", text),
    )
    report.require_ok(
        f"logs are in {plan.workspace / 'smoke'}; run them alone with `kvpatch smoke {plan.out}`"
    )
    return {"report": report.to_json()}
