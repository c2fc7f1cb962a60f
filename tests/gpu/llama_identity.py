"""Equal tokens on a device: what a stock server answers, a patched one must answer with its switch off, and with it on
while it sleeps, is trimmed and has its slot erased in between.

  llama_identity.py --stock DIR --patched DIR [--device cpu|cuda] [--shape NAME] [--short] [--out DIR]
  llama_identity.py ... --sanitizer      the patched server alone, under compute-sanitizer
  llama_identity.py --patched DIR ...    without a stock build: switched on against switched off, on an F32 model, whose
                                         products with more than 16 tokens go through cuBLAS

One slot: tokens and log-probabilities are compared, for every type of cache listed. Four slots in one batch:
the reference against itself is the control, and nothing may differ more often than there; where that differs in more
than half of the answers, nothing is shown and the case fails. Exit: 0 equal, 1 not, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpatch.bench import device as devices
from kvpatch.bench import models, servers
from kvpatch.errors import KvpatchError
from kvpatch.smoke.install import Install
from kvpatch.smoke.models import prompt_ids, tiny_llama
from kvpatch.smoke.report import CheckFailed
from kvpatch.smoke.server import ServerSpec, serve

MATRIX = (
    ("f16", "f16", "on"),
    ("f16", "f16", "off"),
    ("q8_0", "q8_0", "on"),
    ("q4_0", "q4_0", "on"),
    ("q8_0", "f16", "off"),
)
SHORT = MATRIX[:3]
# Prompt tokens and answer tokens of each request; the third begins as the second did.
ASKS = ((20, 48, 1), (900, 160, 2), (1400, 64, 2), (300, 64, 3))
SHORT_ASKS = ((20, 24, 1), (300, 40, 2), (420, 24, 2))
_LEAST_DISTINCT = 12  # tokens in an answer: a model that says one thing for ever shows nothing


@dataclass(frozen=True)
class Case:
    """What one server is started with and asked."""

    name: str
    args: tuple[str, ...]
    context: int
    slots: int
    asks: tuple[tuple[int, int, int], ...]


# What a build without kernels for flash attention has.
PLAIN = (
    Case("F32, K f16, V f16, flash attention off", ("-fa", "off"), 2048, 1, SHORT_ASKS),
    Case("F32, four slots in one batch", ("-fa", "off"), 2048, 4, SHORT_ASKS[:2]),
)


def cases(short: bool) -> Iterator[Case]:
    asks = SHORT_ASKS if short else ASKS
    context = 2048 if short else 16384
    for k, v, flash in SHORT if short else MATRIX:
        yield Case(
            f"K {k}, V {v}, flash attention {flash}", ("-ctk", k, "-ctv", v, "-fa", flash), context, 1, asks
        )
    yield Case("four slots in one batch", (), context, 4, asks[:2])


Result = list[list[tuple[int, float]]]


def ask(one: servers.Client, case: Case, *, stir: bool) -> Result:
    """The answers. `stir`: the server sleeps, is trimmed, and forgets its slot in between; it must not show."""
    found: Result = []
    for number, (count, length, salt) in enumerate(case.asks):
        body: dict[str, Any] = {
            "n_predict": length,
            "temperature": 0,
            "seed": 1,
            "ignore_eos": True,
            "cache_prompt": True,
            "return_tokens": True,
            "n_probs": 1,
        }
        single = prompt_ids(count, salt)
        body["prompt"] = (
            single if case.slots == 1 else [prompt_ids(count, salt + 10 * s) for s in range(case.slots)]
        )
        value = one.server.request("POST", "/completion", json=body, timeout=300).json()
        for part in value if isinstance(value, list) else [value]:
            if "completion_probabilities" not in part:
                raise one.server.failed(f"no answer: {str(part)[:300]}")
            found.append([(int(p["id"]), float(p["logprob"])) for p in part["completion_probabilities"]])
        if stir:
            one.command(("sleep", "trim", "sleep")[number % 3])
    return found


def run_case(setup: servers.Setup, case: Case, side: str, log: list[str]) -> Result:
    who = setup.side(side)
    name = f"{side}-{''.join(c if c.isalnum() else '-' for c in case.name)}"
    started = servers.spec(setup, who, context=case.context, slots=case.slots, extra=case.args, name=name)
    with servers.client(setup, who, started) as one:
        found = ask(one, case, stir=who.elastic)
        if who.elastic:
            slept = sum(int(entry["sleeps"]) for entry in one.figures())
            if not slept:
                raise one.server.failed("the server never slept")
            log.append(f"{slept} sleeps")
            if case.slots == 1:
                one.erase()
                if ask(one, replace(case, asks=case.asks[:1]), stir=False) != found[:1]:
                    raise one.server.failed("after its slot was erased the server answers differently")
    return found


def differing(a: Result, b: Result) -> int:
    """Answers that differ in a token or a log-probability."""
    if len(a) != len(b):
        raise CheckFailed(f"{len(a)} answers and {len(b)}")
    return sum(x != y for x, y in zip(a, b, strict=True))


def compare(setup: servers.Setup, case: Case, sides: Sequence[str]) -> tuple[bool, str]:
    """The first side is what the others are held against."""
    log: list[str] = []
    found = {side: run_case(setup, case, side, log) for side in sides}
    expected = found[sides[0]]
    differ = {side: differing(expected, found[side]) for side in sides[1:]}
    allowed = 0
    if case.slots > 1:
        allowed = differing(expected, run_case(setup, case, sides[0], log))
        log.append(f"control: {allowed} differ")
    good, why = judge(expected, differ, allowed)
    tokens = sum(len(answer) for answer in expected)
    shown = ", ".join(f"{side} {count}" for side, count in differ.items())
    return good, f"{tokens} tokens, differing answers: {shown} ({', '.join(log)}){why}"


def judge(expected: Result, differ: Mapping[str, int], allowed: int) -> tuple[bool, str]:
    """Whether a case passes, and what keeps it from showing anything."""
    if 2 * allowed > len(expected):
        return False, f"; not judged: the control itself differs in {allowed} of {len(expected)}"
    distinct = min(len({token for token, _ in answer}) for answer in expected)
    if distinct < _LEAST_DISTINCT:
        return False, f"; only {distinct} different tokens"
    return max(differ.values()) <= allowed, ""


def sanitize(setup: servers.Setup) -> bool:
    """A patched server under compute-sanitizer: asked, asleep and awake, in several types of cache."""
    good = True
    for k, v, flash in (("f16", "f16", "on"), ("q8_0", "f16", "off")):
        case = Case(f"{k} {v} {flash}", ("-ctk", k, "-ctv", v, "-fa", flash), 4096, 1, SHORT_ASKS)
        report = setup.work / f"memcheck-{k}-{flash}.txt"
        who = setup.side("on")
        plain = servers.spec(setup, who, context=case.context, extra=case.args, name=f"memcheck-{k}-{flash}")
        tool = (
            "compute-sanitizer",
            "--tool",
            "memcheck",
            "--target-processes",
            "all",
            "--report-api-errors",
            "no",
        )
        started = replace_argv(plain, (*tool, "--log-file", str(report)))
        with serve(started, setup.work) as server:
            one = servers.Client(server, who)
            ask(one, case, stir=True)
            one.close()
            end_child(server.descendants())
            deadline = time.monotonic() + 60
            while server.returncode() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        text = report.read_text(encoding="utf-8", errors="replace")
        summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line]
        clean = bool(summary) and all("ERROR SUMMARY: 0 errors" in line for line in summary)
        good &= clean
        say(f"{'ok' if clean else 'FAIL'} memcheck, {case.name}: {'; '.join(summary) or 'no summary'}")
    return good


def replace_argv(plain: ServerSpec, before: Sequence[str]) -> ServerSpec:
    """The same server, started by another program. It may be much slower."""
    return replace(plain, argv=lambda port: [*before, *plain.argv(port)], start_seconds=240.0)


def end_child(pids: Sequence[int]) -> None:
    """Ask the server to end, not the tool: its report is written when the server has."""
    found = [pid for pid in pids if Path(f"/proc/{pid}/exe").resolve().name == "llama-server"]
    if not found:
        raise CheckFailed(f"no llama-server among the processes {pids} that the tool started")
    for pid in found:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stock", type=Path)
    parser.add_argument("--patched", type=Path, required=True)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--shape", choices=sorted(models.SHAPES), default="small")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--sanitizer", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    work = (given.out or Path(tempfile.mkdtemp(prefix="identity-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    try:
        if given.stock is None:
            patched = Install.detect(given.patched)
            stock, model = patched, models.Model(path=tiny_llama(work / "tiny-f32.gguf", 1).path)
            sides: tuple[str, ...] = ("off", "on")
            wanted = list(PLAIN)
        else:
            stock, patched, _ = servers.installs(given.stock, given.patched)
            model = models.ensure(models.folder(), models.shape_named(given.shape))
            sides, wanted = ("stock", "off", "on"), list(cases(given.short))
        device = devices.of_name(given.device)
        setup = servers.Setup(stock=stock, patched=patched, model=model, device=device, work=work)
        if given.sanitizer:
            good = sanitize(setup)
        else:
            rows = []
            for case in wanted:
                began = time.monotonic()
                try:
                    ok, text = compare(setup, case, sides)
                except CheckFailed as failure:
                    ok, text = False, failure.detail
                    for name, lines in failure.logs.items():
                        text += f"\nlast lines of {name}:\n{lines}"
                rows.append({"case": case.name, "ok": ok, "detail": text})
                say(f"{'ok' if ok else 'FAIL'} {case.name}: {text} ({time.monotonic() - began:.1f} s)")
            (work / "identity.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            good = all(row["ok"] for row in rows)
            say(f"{'ok' if good else 'FAIL'}: {sum(bool(r['ok']) for r in rows)} of {len(rows)} cases equal")
    except (CheckFailed, KvpatchError) as error:
        say(f"FAIL: {error}")
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
