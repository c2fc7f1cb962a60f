"""A model larger than the free card is split over GPU and CPU by upstream's fit, with the patches as in stock.

  llama_split.py --stock DIR --patched DIR [--device cpu|cuda] [--shape NAME] [--leave BYTES] [--out DIR]

A ballast process leaves less of the card than the model needs. Both builds must load and answer, with layers on both
sides; the patched one, which counts a cache as what it will map, must put no fewer on the GPU. Exit: 0 so, 1 not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from kvpatch.bench import device as devices
from kvpatch.bench import models, servers
from kvpatch.errors import KvpatchError
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.report import CheckFailed

_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
CONTEXT = 16384


def load(setup: servers.Setup, side: str) -> dict[str, object]:
    """Start one server with upstream's defaults as to layers; what it put where, and how fast it is."""
    who = setup.side(side)
    # The later of two equal options counts.
    extra = ("-fit", "on", "--log-verbosity", "4", *(("-ngl", "auto") if setup.device.name == "cuda" else ()))
    started = servers.spec(setup, who, context=CONTEXT, extra=extra, name=f"split-{side}")
    with servers.client(setup, who, started) as one:
        first = one.complete(prompt_ids(600), 48)
        # Of a prompt in the cache, both: one token by itself is rounded otherwise than as the last of a batch.
        answer = one.complete(prompt_ids(600), 48)
        again = one.complete(prompt_ids(600), 48)
        held = setup.device.held(one.server.pid)
        found = _OFFLOADED.findall(one.server.log_text())
    if again.tokens != answer.tokens:
        raise CheckFailed(f"{side}: the same request, another answer")
    if len(set(answer.tokens)) < 12:
        raise CheckFailed(f"{side}: an answer of only {len(set(answer.tokens))} different tokens")
    return {
        "layers": int(found[-1][0]) if found else 0,
        "of": int(found[-1][1]) if found else 0,
        "device_bytes": held,
        "prompt_ms": first.prompt_ms,
        "ms_per_token": answer.predicted_ms / 47,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stock", type=Path, required=True)
    parser.add_argument("--patched", type=Path, required=True)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--shape", choices=sorted(models.SHAPES), default="8b")
    parser.add_argument("--leave", type=int, default=4_500_000_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    work = (given.out or Path(tempfile.mkdtemp(prefix="split-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    problems = []
    try:
        stock, patched, _ = servers.installs(given.stock, given.patched)
        device = devices.of_name(given.device)
        model = models.ensure(models.folder(), models.shape_named(given.shape))
        setup = servers.Setup(stock=stock, patched=patched, model=model, device=device, work=work)
        with device.ballast(given.leave) as held:
            found = {side: load(setup, side) for side in ("stock", "off", "on")}
    except (CheckFailed, KvpatchError) as error:
        sys.stdout.write(f"FAIL: {error}\n")
        for name, lines in getattr(error, "logs", {}).items():
            sys.stdout.write(f"last lines of {name}:\n{lines}\n")
        return 1
    (work / "split.json").write_text(
        json.dumps({"ballast": held, **found}, indent=2) + "\n", encoding="utf-8"
    )
    for side, row in found.items():
        sys.stdout.write(f"{side}: {row}\n")
    layers = {side: int(str(row["layers"])) for side, row in found.items()}
    if given.device == "cuda":
        total = int(str(found["stock"]["of"]))
        if not 0 < layers["stock"] < total:
            problems.append(f"stock put {layers['stock']} of {total} layers on the GPU: nothing was split")
        if layers["on"] < layers["stock"] or layers["off"] != layers["stock"]:
            problems.append(f"layers on the GPU: {layers}")
    for problem in problems:
        sys.stdout.write(f"FAIL: {problem}\n")
    if not problems:
        sys.stdout.write(f"ok: layers on the GPU: {layers}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
