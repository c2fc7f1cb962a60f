"""kvpatch.json beside the binaries: what they were made from. `kvpatch verify` holds a folder against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpatch import hashing, paths
from kvpatch.errors import VerifyError
from kvpatch.plan import Plan
from kvpatch.stages.output import MANIFEST, names

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result of holding a folder against its manifest. `smoked` is None when smoke was not run on it."""

    manifest: dict[str, Any]
    checked: int
    smoked: bool | None


def build(plan: Plan, values: Mapping[str, dict[str, Any]], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a build as a value. Apart from the smoke report no time and no path of this machine is
    in it, so equal builds give equal manifests."""
    artifacts = [{k: v for k, v in row.items() if k != "mtime_ns"} for row in values["compile"]["artifacts"]]
    smoke = values.get("smoke", {}).get("report")
    return {
        "schema": SCHEMA,
        **plan.to_json(),
        "label": plan.label,
        "stock": plan.stock,
        "warnings": list(plan.warnings),
        "upstream_commits": {name: tree["upstream_commit"] for name, tree in values["fetch"].items()},
        "patched_commits": {name: tree["commit"] for name, tree in values["apply"].items()},
        "generated": values["generate"],
        "flags": dict(flags),
        "artifacts": artifacts,
        "smoke": smoke,
    }


def write(manifest: Mapping[str, Any], out: Path) -> Path:
    """Write the manifest into the folder `out`, all at once."""
    path = out / MANIFEST
    paths.write_whole(path, json.dumps(manifest, indent=2) + "\n")
    return path


def read(out: Path) -> dict[str, Any]:
    """The manifest of the folder `out`. Raises VerifyError when there is none or it is no manifest."""
    path = out / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VerifyError(
            f"{out} has no {MANIFEST}, so it is not a build of kvpatch",
            hint="name a folder that `kvpatch build --out` wrote",
        ) from error
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path} cannot be read: {error}", hint="build again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise VerifyError(
            f"{path} is not a manifest of schema {SCHEMA}", hint="build again with this kvpatch"
        )
    return manifest


def verify(out: Path) -> Verification:
    """Hash every file of the folder again. Raises VerifyError that names each file changed, missing or unknown."""
    manifest = read(out)
    try:
        expected = {row["path"]: row for row in manifest["artifacts"]}
        sums = {name: row.get("link") or row["sha256"] for name, row in expected.items()}
        smoked = None if manifest["smoke"] is None else bool(manifest["smoke"]["ok"])
        str(manifest["label"])
    except (KeyError, TypeError, AttributeError) as error:
        raise VerifyError(
            f"{out / MANIFEST} is damaged: {error!r}", hint="build again, or take a fresh copy"
        ) from error
    problems = []
    for name, row in expected.items():
        path = out / name
        if "link" in row:
            if not path.is_symlink() or str(path.readlink()) != sums[name]:
                problems.append(f"{name}: is not a link to {sums[name]}")
        elif path.is_symlink() or not path.is_file():
            problems.append(f"{name}: missing")
        elif hashing.of_file(path) != sums[name]:
            problems.append(f"{name}: changed")
    present = set(names(out))
    problems.extend(f"{name}: not in the manifest" for name in sorted(present - set(expected)))
    if problems:
        raise VerifyError(
            f"{out} does not match its {MANIFEST}: {len(problems)} differences\n" + "\n".join(problems),
            hint="build again, or take a fresh copy",
            data={"problems": problems},
        )
    return Verification(manifest=manifest, checked=len(expected), smoked=smoked)
