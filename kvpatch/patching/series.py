"""A directory of patches: the `series` file, the patches it lists, and which of them a target needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from kvpatch.patching.errors import Finding, PatchFormatError
from kvpatch.patching.model import Patch
from kvpatch.patching.parse import parse_patch
from kvpatch.patching.ranges import RangeError, Target, parse_target


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Validated patches in the order of their series file."""

    directory: Path
    patches: tuple[Patch, ...]

    @property
    def sha256(self) -> str:
        """One hash over names and contents in order: the identity of the series."""
        lines = (f"{patch.sha256}  {patch.name}\n" for patch in self.patches)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def select(self, target: Target | str) -> tuple[Patch, ...]:
        """The patches for one version or day, in series order; of one stem, an exact range beats a wider one.

        Raises PatchFormatError when two patches of one stem claim the target equally, or when ranges are of
        another kind (version, day) than the target.
        """
        findings: list[Finding] = []
        try:
            wanted = parse_target(target) if isinstance(target, str) else target
        except RangeError as error:
            raise PatchFormatError(
                "no patch can be chosen", [_finding(self.directory.name, error)]
            ) from error
        best: dict[str, Patch] = {}
        for patch in self.patches:
            try:
                if not patch.range.matches(wanted):
                    continue
            except RangeError as error:
                findings.append(_finding(patch.name, error))
                continue
            rival = best.get(patch.stem)
            if rival is None or (rival.range.exact is None and patch.range.exact is not None):
                best[patch.stem] = patch
            elif (rival.range.exact is None) == (patch.range.exact is None):
                findings.append(
                    Finding(
                        file=patch.name,
                        code="overlap",
                        text=f"is for {wanted}, and so is {rival.name}; one may be",
                    )
                )
        if findings:
            raise PatchFormatError(f"{self.directory}: no patch can be chosen for {wanted}", findings)
        chosen = {patch.name for patch in best.values()}
        return tuple(patch for patch in self.patches if patch.name in chosen)


def load_series(directory: Path) -> Series:
    """Read and validate a series. Raises PatchFormatError that lists every finding of every file."""
    findings: list[Finding] = []
    series_file = directory / "series"
    try:
        text = series_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchFormatError(
            f"{directory}: no usable series file", [Finding(file="series", code="series", text=str(error))]
        ) from error
    names: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name = line.partition("#")[0].strip()
        if not name:
            continue
        if name in names:
            findings.append(
                Finding(
                    file="series", line=number, code="series", text=f"{name} stands in line {names[name]} too"
                )
            )
            continue
        names[name] = number
        if not (directory / name).is_file():
            findings.append(
                Finding(file="series", line=number, code="missing", text=f"{name} is not in {directory}")
            )
    findings.extend(
        Finding(file=file.name, code="unlisted", text="is not in the series file; list it or remove it")
        for file in sorted(directory.glob("*.patch"))
        if file.name not in names
    )
    if not names:
        findings.append(Finding(file="series", code="series", text="lists no patch"))
    patches: list[Patch] = []
    for name in names:
        if (directory / name).is_file():
            patch, wrong = parse_patch(directory / name)
            findings.extend(wrong)
            if patch is not None:
                patches.append(patch)
    findings.extend(_clashes(patches))
    if findings:
        raise PatchFormatError(str(directory), findings)
    return Series(directory=directory, patches=tuple(patches))


def check_matches(series: Series, targets: Iterable[Target | str]) -> None:
    """Raise PatchFormatError for patches that none of the known `targets` would ever be given.

    A patch whose every target goes to a more exact variant counts as never used, too.
    """
    known = list(targets)
    used = {patch.name for target in known for patch in series.select(target)}
    findings = [
        Finding(
            file=patch.name,
            code="unused",
            text=f"range {patch.range.text!r} matches none of the {len(known)} known releases: "
            "a typing error, or a patch to remove",
        )
        for patch in series.patches
        if patch.name not in used
    ]
    if findings:
        raise PatchFormatError(str(series.directory), findings)


def _clashes(patches: list[Patch]) -> list[Finding]:
    findings: list[Finding] = []
    for patch in patches[1:]:
        if patch.range.kind != patches[0].range.kind:
            text = f"range {patch.range.text!r} is on a {patch.range.kind}, unlike that of {patches[0].name}"
            findings.append(Finding(file=patch.name, code="range-kind", text=text))
    for a, b in combinations(patches, 2):
        if a.stem == b.stem and a.range.overlaps(b.range):
            text = f"range {b.range.text!r} overlaps {a.range.text!r} of {a.name}"
            findings.append(Finding(file=b.name, code="overlap", text=text))
    return findings


def _finding(file: str, error: RangeError) -> Finding:
    return Finding(file=file, code="range", text=str(error))
