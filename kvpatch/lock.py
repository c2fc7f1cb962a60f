"""The lock file: what a build was made from, kept in the user's repository. `--locked` refuses anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvpatch.errors import UsageError, VerifyError
from kvpatch.plan import Plan

SCHEMA = 1
DEFAULT = Path("kvpatch.lock")


def content(plan: Plan) -> dict[str, Any]:
    """The part of a plan that decides its result."""
    return {"schema": SCHEMA, **plan.to_json()}


def write(plan: Plan, path: Path) -> None:
    """Write the lock of `plan`. Raises UsageError when the file cannot be written."""
    try:
        path.write_text(json.dumps(content(plan), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the lock file {path}: {error.strerror or error}") from error


def read(path: Path) -> Any:
    """What the lock file holds. Raises UsageError when there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"--locked: there is no {path}", hint=f"write it with `kvpatch build --lock {path} ...`"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--locked: {path} cannot be read: {error}", hint="write it again with --lock"
        ) from error


def check(plan: Plan, path: Path) -> None:
    """Raise VerifyError naming each difference between `plan` and the lock file; UsageError as `read` does."""
    locked = read(path)
    differences = list(_differences("", locked, content(plan)))
    if differences:
        raise VerifyError(
            f"the plan is not the one in {path}: {len(differences)} differences\n" + "\n".join(differences),
            hint=f"if the change is meant, write the lock again: `kvpatch build --lock {path} ...`",
            data={"differences": differences},
        )


def _differences(where: str, locked: Any, planned: Any) -> list[str]:
    if isinstance(locked, dict) and isinstance(planned, dict):
        found = []
        for key in sorted(locked.keys() | planned.keys()):
            name = f"{where}.{key}" if where else key
            found += _differences(name, locked.get(key), planned.get(key))
        return found
    if isinstance(locked, list) and isinstance(planned, list) and len(locked) == len(planned):
        found = []
        for number, (one, other) in enumerate(zip(locked, planned, strict=True), 1):
            found += _differences(f"{where}[{number}]", one, other)
        return found
    return [] if locked == planned else [f"{where}: locked {locked!r}, planned {planned!r}"]
