"""Run a patched Ollama end to end on the CPU: six models and an embedder under a limit that stock fits two in.

  python -m tests.ollama_e2e --stock DIR --patched DIR --minutes 3 --kills

Parts: `traffic`: eight clients at once, different models, num_ctx, routes, streamed or not; no request may fail,
each answer must be the one that the stock build gives to a single client; models must sleep, wake and wait for
room, and none may be loaded twice. `rude`: the same with clients that hang up, keep_alive 0, -1 and short, `ollama
stop`. `keeping`: keep_alive and `ollama stop` one by one. `kills` and `service` (with --kills): kill -9 of runners,
of `ollama serve` and of kvcachedd. `identity`: switched off, answers, /api/ps, argv and environment of the child
are stock's. After each part nothing may be left: processes, slots of the ledger, files, sockets.
OUT/ollama-e2e.json has everything. Exit: 0 good, 1 not, 2 usage."""

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
from tests.ollama_e2e.run import Report, run
from tests.ollama_e2e.setting import KILLS, PARTS, Options
from tests.ollama_e2e.verdict import Evidence

_MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ollama_e2e",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stock", type=Path, required=True, help="folder of an unpatched build of Ollama")
    parser.add_argument(
        "--patched", type=Path, required=True, help="folder of a patched build of the same release"
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="of traffic; half as many with rude clients"
    )
    parser.add_argument("--seed", type=int, default=None, help="a random one is chosen and printed")
    parser.add_argument("--kills", action="store_true", help="with the kill tests")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further setting of the patched servers",
    )
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
    parts = tuple(args.only or (part for part in PARTS if part not in KILLS or args.kills))
    folder = (args.out or Path(tempfile.mkdtemp(prefix="ollama-e2e-"))).absolute()
    try:
        stock, patched = Install.detect(args.stock), Install.detect(args.patched)
        for install, elastic in ((stock, False), (patched, True)):
            if install.ollama is None or install.patched is not elastic:
                parser.error(f"{install.root} is no {'patched' if elastic else 'stock'} build of Ollama")
        report = run(
            Options(
                stock=stock,
                patched=patched,
                folder=folder,
                seed=seed,
                minutes=args.minutes,
                parts=parts,
                env=dict(word.split("=", 1) for word in args.env),
            ),
            say,
        )
    except (CheckFailed, KvpatchError, ProcessFailure) as error:
        say(f"FAILED (seed {seed}): {error}")
        for name, tail in getattr(error, "logs", {}).items():
            sys.stdout.write(f"last lines of {name}:\n{tail}\n")
        return 1
    target = folder / "ollama-e2e.json"
    target.write_text(
        json.dumps(dataclasses.asdict(report), indent=1, default=_plain) + "\n", encoding="utf-8"
    )
    for line in table(report):
        say(line)
    say(f"{'FAILED' if report.problems else 'ok'} (seed {seed}, report {target})")
    return 1 if report.problems else 0


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _lines(one: Evidence) -> list[str]:
    lines = []
    if one.tally is not None:
        found = one.tally
        lines.append(
            f"{one.name}: {found.answers} answers, {len(found.wrong)} differ ({found.ties} more where stock's two "
            f"best tokens tie), {len(found.failures)} failures, {found.dropped} clients hung up; slowest "
            f"{found.slowest:.1f} s"
        )
    else:
        lines.append(f"{one.name}: {len(one.problems)} problems")
    if one.events:
        lines.append(f"  decisions {dict(one.events)}; children started {dict(sorted(one.started.items()))}")
    if one.seen is not None:
        lines.append(
            f"  {one.seen.looks} looks: states {one.seen.states}, at most {one.seen.awake} awake and "
            f"{one.seen.peak / _MIB:.1f} MiB charged, /api/ps {one.seen.slowest:.2f} s at most"
        )
    lines += [f"  {name}: {value}" for name, value in one.figures.items()]
    return lines


def table(report: Report) -> list[str]:
    """The result as lines."""
    lines = [f"limit {report.limit / _MIB:.1f} MiB, {report.seconds:.0f} s"]
    for one in report.evidence:
        lines += _lines(one)
    return [*lines, *(f"PROBLEM: {text}" for text in report.problems)]


if __name__ == "__main__":
    sys.exit(main())
