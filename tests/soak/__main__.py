"""Soak a patched llama-server: random prompts on parallel slots under a tight limit, with trims, sleeps,
wakes and erases in between, and every answer compared with the same prompt run alone on the stock build.

  python -m tests.soak --stock DIR --patched DIR --minutes 30

What parallel slots answer depends on who shares a batch, in stock too: a stock server plays the same rounds,
and its rate of mismatches is the measure. Each mismatch of the patched one is asked again alone, and must
then be equal, as to tokens and log-probabilities. At the end nothing may be left: mapped KV memory after
erasing and trimming, charges, resident memory, mappings, files, slots of the ledger. OUT/soak.json has
everything. Exit: 0 good, 1 not, 2 usage."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
import tempfile
import time
from pathlib import Path

from kvpatch.errors import KvpatchError
from kvpatch.process import ProcessFailure
from kvpatch.smoke.install import Install
from kvpatch.smoke.report import CheckFailed
from tests.soak import verdict
from tests.soak.run import Options, Report, soak


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stock", type=Path, required=True, help="folder of an unpatched build")
    parser.add_argument(
        "--patched", type=Path, required=True, help="folder of a patched build of the same commit"
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="a random one is chosen and printed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", type=Path, help="a GGUF file for all servers, in place of small random ones"
    )
    parser.add_argument("--only", action="append", default=[], help="a profile's name; may be repeated")
    parser.add_argument(
        "--out", type=Path, help="folder for models, logs and the report; a new one in the temporary one"
    )
    args = parser.parse_args(argv)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    begin = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - begin:6.0f} s] {text}\n")
        sys.stdout.flush()

    say(f"seed {seed}")
    folder = args.out or Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        report = soak(
            Options(
                stock=Install.detect(args.stock),
                patched=Install.detect(args.patched),
                folder=folder.absolute(),
                seed=seed,
                minutes=args.minutes,
                device=args.device,
                model=args.model,
                only=tuple(args.only),
            ),
            say,
        )
    except (CheckFailed, KvpatchError, ProcessFailure) as error:
        say(f"FAILED (seed {seed}): {error}")
        for name, tail in getattr(error, "logs", {}).items():
            sys.stdout.write(f"last lines of {name}:\n{tail}\n")
        return 1
    (folder / "soak.json").write_text(
        json.dumps(dataclasses.asdict(report), indent=1, default=str) + "\n", encoding="utf-8"
    )
    for line in table(report):
        say(line)
    say(
        f"{'ok' if report.ok else 'FAILED'} (seed {seed}, {report.rounds} rounds, report {folder / 'soak.json'})"
    )
    return 0 if report.ok else 1


def _mib(count: int) -> str:
    return f"{count / verdict.MIB:.1f}"


def _grown(one: verdict.Evidence) -> str:
    for grown in verdict.grown(one.held, one.control_held):
        if grown.what == "rss":
            return (
                f"grown {_mib(grown.ours)} MiB, allowed {_mib(grown.allowed)} (stock {_mib(grown.stock)} with "
                f"1/{grown.per:.2f} of the answers)"
            )
    return f"not judged for growth ({len(one.held)} and {len(one.control_held)} readings)"


def table(report: Report) -> list[str]:
    """The result as lines."""
    lines = []
    for one in report.evidence:
        last = one.held[-1] if one.held else one.fresh
        odds = verdict.chance(
            len(one.control.mismatches), one.control.answers, len(one.patched.mismatches), one.patched.answers
        )
        lines += [
            f"{one.name}: {one.patched.answers} answers, {len(one.patched.mismatches)} differ "
            f"({one.patched.rate:.2%}); stock {len(one.control.mismatches)} of {one.control.answers} "
            f"({one.control.rate:.2%}), by chance p = {odds:.2g}; alone {len(one.differ_alone)} of {one.alone} differ",
            f"  {one.patched.refusals} refusals, {len(one.patched.refused)} never answered, "
            f"{one.patched.dropped} streams cut; done: {dict(sorted(one.counts.items()))}, "
            f"{_mib(one.slept)} MiB slept",
            f"  at the end {last.kinds[0]} bytes of KV, claim {last.claim} (at start {one.fresh.claim}); "
            f"RSS {_mib(one.fresh.rss)} MiB, {_grown(one)}; {one.slots_left} slots left",
        ]
    return [*lines, *(f"PROBLEM: {text}" for text in report.problems)]


if __name__ == "__main__":
    sys.exit(main())
