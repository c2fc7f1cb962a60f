"""What must hold for a patched Ollama: the same answers as without the elastic cache, models side by side,
memory that /api/ps reports and the kernel confirms, refusals that name their reason, and no process left
behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvpatch.smoke import models
from kvpatch.smoke.install import Install
from kvpatch.smoke.llama_checks import LEAST_DISTINCT, Models
from kvpatch.smoke.models import prompt_text
from kvpatch.smoke.ollama import (
    CONTEXT,
    Instance,
    chat,
    children,
    create,
    embed,
    generate,
    generate_stream,
    kv_fields,
    loaded,
    stop,
    wait_gone,
    witnessed,
)
from kvpatch.smoke.report import CheckFailed, Figure, Outcome, Recorder
from kvpatch.smoke.server import Server, serve, start_and_wait_end, tail

ENABLED, MEMORY, IDLE = "OLLAMA_KVCACHED_ENABLED", "OLLAMA_KVCACHED_MEMORY_GB", "OLLAMA_KVCACHED_IDLE_SECONDS"
_LIMIT = 1_000_000_000
_PAGE = 2**21
_CONFIG = "kvcached:\n  enabled: true\n  memory_limit: 1GB\n"
_FIRST, _SECOND, _EMBEDDER = "kv-first", "kv-second", "kv-embed"
_TOKENS = 64
_SHORT = prompt_text(60, 11)
_LONG_CELLS = 3000
_LONG = prompt_text(_LONG_CELLS, 12)
_START_SHARE = 10
# Ollama reads sizes from the runner's log, which tells of the last pages of an answer later: a fiftieth may lack.
_LOG_SHARE = 50
# GB: less than a model's weights alone, and little more than those and the first KV step.
_LESS_THAN_WEIGHTS, _NEXT_TO_NOTHING_LEFT = "0.001", "0.0035"


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """What one instance answered to the same requests in the same order."""

    texts: Mapping[str, str]
    vectors: tuple[tuple[float, ...], ...]
    pieces: int
    memory: Mapping[str, int]


def check_ollama(recorder: Recorder, install: Install, made: Models, folder: Path) -> None:
    """All checks of `ollama serve`."""
    embedder = models.tiny_embedding(folder / "embed.gguf", 1)
    stock = Instance(install=install, folder=folder, name="off")
    elastic = Instance(install=install, folder=folder, name="on", config=_CONFIG)
    found: dict[str, Talk] = {}

    recorder.run("ollama: help names the settings", lambda: _help(stock))
    recorder.run("ollama: serves with the elastic cache off", lambda: _serve(stock, made, embedder, found))
    recorder.run("ollama: serves with the elastic cache on", lambda: _serve(elastic, made, embedder, found))
    if len(found) == 2:
        off, on = found["off"], found["on"]
        recorder.run("ollama: answers equal, off and on", lambda: _same(off, on))
        recorder.run("ollama: two models alternate", lambda: _alternate(on))
        recorder.run("ollama: /api/ps agrees with the kernel", lambda: _memory(on, made.first))
    if found:
        # The models are in the store by now.
        for name, limit, words in (
            ("a limit below one model's need is refused", _LESS_THAN_WEIGHTS, (MEMORY, _FIRST, "limit")),
            (
                "a limit that compute buffers pass is refused",
                _NEXT_TO_NOTHING_LEFT,
                (MEMORY, "limit", "compute"),
            ),
        ):
            recorder.run(f"ollama: {name}", partial(_refused, install, folder, limit, words))
    if "on" in found:
        on = found["on"]
        recorder.run("ollama: models take turns under a limit", lambda: _turns(install, folder, on))
    for name, settings, config, needle in (
        ("a bad value", {ENABLED: "perhaps"}, None, ENABLED),
        ("a bad size", {ENABLED: "true", MEMORY: "lots"}, None, MEMORY),
        ("a bad number of seconds", {ENABLED: "true", IDLE: "soon"}, None, IDLE),
        (
            "a bad line of config.yaml",
            {},
            "kvcached:\n  enabled: true\n  memory_limit: 20\n",
            "config.yaml line 3",
        ),
    ):
        bad = Instance(
            install=install, folder=folder, name=name.replace(" ", "-"), settings=settings, config=config
        )
        recorder.run(f"ollama: {name} is refused at start", partial(_refuses, bad, needle))


def _help(instance: Instance) -> Outcome:
    text = instance.command(9, "serve", "--help")
    missing = [name for name in (ENABLED, MEMORY, IDLE) if name not in text]
    if missing:
        raise CheckFailed(
            f"`ollama serve --help` does not name {', '.join(missing)}", logs={"help": tail(text)}
        )
    version = instance.command(9, "--version")
    named = [line for line in version.splitlines() if line.startswith("kvpatch ") and ", series " in line]
    if not named:
        raise CheckFailed(
            "`ollama --version` does not name the patch series", logs={"version": tail(version)}
        )
    return Outcome(named[0])


def _serve(instance: Instance, made: Models, embedder: models.TinyModel, found: dict[str, Talk]) -> Outcome:
    with serve(instance.spec(), instance.folder) as server:
        for name, model in ((_FIRST, made.first), (_SECOND, made.second), (_EMBEDDER, embedder)):
            create(server, name, model)
        talk = _talk(server, instance)
        seconds = _stop_all(instance, server)
        log = server.log_text()
    if f"{ENABLED}:" not in log and f"{ENABLED}=" not in log:
        raise CheckFailed(f"the start-up log does not show {ENABLED}", logs={server.name: tail(log)})
    lines = sum("kvcached: " in line for line in log.splitlines())
    if instance.config is None and lines:
        raise CheckFailed(
            f"switched off, {lines} lines of the log are about the elastic cache",
            logs={server.name: tail(log)},
        )
    if instance.config is not None and "config.yaml line" not in log:
        raise CheckFailed(
            "the start-up log does not say that config.yaml sets the limit", logs={server.name: tail(log)}
        )
    found[instance.name] = talk
    return Outcome(
        f"{len(talk.texts)} answers, one in {talk.pieces} pieces, {len(talk.vectors)} embeddings",
        {
            "answers": len(talk.texts),
            "pieces": talk.pieces,
            "stop_seconds": round(seconds, 2),
            "log lines": lines,
        },
    )


def _talk(server: Server, instance: Instance) -> Talk:
    elastic = instance.config is not None
    texts = {}
    memory: dict[str, int] = {}
    texts["generate"] = generate(server, _FIRST, _SHORT, _TOKENS)
    if elastic:
        memory.update(_figures(server, instance, "short"))
    texts["generate, long prompt"] = generate(server, _FIRST, _LONG, _TOKENS)
    if elastic:
        memory.update(_figures(server, instance, "long"))
    elif any(model.kv is not None for model in loaded(server).values()):
        raise server.failed("switched off, /api/ps still has a `kvcached` object")
    texts["chat"] = chat(server, _FIRST, _SHORT, _TOKENS)
    texts["stream"], pieces = generate_stream(server, _FIRST, prompt_text(80, 13), _TOKENS)
    if pieces < 2:
        raise server.failed(f"a stream of {_TOKENS} tokens came in {pieces} piece")
    for turn in (1, 2, 3):
        for model in (_FIRST, _SECOND):
            texts[f"{model}, turn {turn}"] = generate(server, model, _SHORT, _TOKENS)
    both = loaded(server)
    if not {_FIRST, _SECOND} <= set(both):
        raise server.failed(f"two models should be in memory side by side, /api/ps shows {sorted(both)}")
    if elastic:
        memory["lease, both"] = sum(both[name].bytes(server, "lease") for name in (_FIRST, _SECOND))
        memory["charge, both"] = sum(both[name].bytes(server, "charge") for name in (_FIRST, _SECOND))
    vectors = embed(server, _EMBEDDER, [_SHORT, prompt_text(60, 14)])
    if vectors[0] == vectors[1]:
        raise server.failed("two texts have the same embedding")
    return Talk(texts=texts, vectors=tuple(map(tuple, vectors)), pieces=pieces, memory=memory)


def _figures(server: Server, instance: Instance, moment: str) -> dict[str, int]:
    """Figures of /api/ps, the ledger and the kernel for the first model, taken while no request runs."""
    usage, held = witnessed(server, instance)
    model = loaded(server).get(_FIRST)
    if model is None or model.kv is None:
        raise server.failed(f"/api/ps has no `kvcached` object for {_FIRST}")
    state = model.kv.get("state")
    if not isinstance(state, str) or not state:
        raise server.failed(f"/api/ps: kvcached.state of {_FIRST} is {state!r}")
    figures = {f"{moment}: {key}": value for key, value in kv_fields(server, model).items()}
    figures[f"{moment}: size"] = model.size
    figures[f"{moment}: ledger"] = held.kv
    figures[f"{moment}: weights"] = held.weights
    figures[f"{moment}: compute"] = held.compute
    figures[f"{moment}: usable"] = usage.usable
    figures[f"{moment}: held_min"] = usage.held_min
    figures[f"{moment}: held_max"] = usage.held_max
    return figures


def _stop_all(instance: Instance, server: Server) -> float:
    """Unload one model through the API, the others from the command line; then no child may be left."""
    stop(server, _FIRST)
    seconds = wait_gone(server, [_FIRST])
    for name in sorted(loaded(server)):
        instance.command(server.port, "stop", name)
    return seconds + wait_gone(server, [_SECOND, _EMBEDDER])


def _same(off: Talk, on: Talk) -> Outcome:
    for name, text in off.texts.items():
        if on.texts[name] != text:
            raise CheckFailed(
                f"{name}: answered {text[:80]!r} with the cache off, {on.texts[name][:80]!r} with it on"
            )
    if off.vectors != on.vectors:
        raise CheckFailed("embeddings differ with the cache off and on")
    words = {name: _distinct(text) for name, text in off.texts.items()}
    poorest = min(words, key=lambda name: words[name])
    if words[poorest] < LEAST_DISTINCT:
        raise CheckFailed(f"{poorest}: {words[poorest]} distinct syllables, fewer than {LEAST_DISTINCT}")
    return Outcome(
        f"{len(off.texts)} answers and {len(off.vectors)} embeddings",
        {"least distinct syllables": words[poorest]},
    )


def _distinct(text: str) -> int:
    """Distinct tokens of an answer: each is a syllable of two letters, with or without a space before it."""
    found = set()
    position = 0
    while position < len(text):
        width = 3 if text[position] == " " else 2
        found.add(text[position : position + width])
        position += width
    return len(found)


def _alternate(talk: Talk) -> Outcome:
    for model in (_FIRST, _SECOND):
        second, third = talk.texts[f"{model}, turn 2"], talk.texts[f"{model}, turn 3"]
        if second != third:
            raise CheckFailed(
                f"{model} answers otherwise after the other model had its turn: {second!r}, {third!r}"
            )
    if talk.texts[f"{_FIRST}, turn 2"] == talk.texts[f"{_SECOND}, turn 2"]:
        raise CheckFailed("the two models answer alike")
    lease, charge = talk.memory["lease, both"], talk.memory["charge, both"]
    if not 0 < lease <= charge:
        raise CheckFailed(f"two models in memory: leases of {lease} bytes, charges of {charge}")
    return Outcome("different answers, each the same on return", {"leases": lease, "charges": charge})


def _memory(talk: Talk, model: models.TinyModel) -> Outcome:
    figures: dict[str, Figure] = dict(talk.memory)
    memory = talk.memory
    for moment in ("short", "long"):
        mapped = memory[f"{moment}: kv_mapped"]
        least, most = memory[f"{moment}: held_min"], memory[f"{moment}: held_max"]
        if (
            not mapped == memory[f"{moment}: ledger"] == memory[f"{moment}: usable"]
            or not least <= mapped <= most
        ):
            raise CheckFailed(
                f"after a {moment} prompt /api/ps says {mapped} bytes are mapped, the ledger "
                f"{memory[f'{moment}: ledger']}; by the kernel {memory[f'{moment}: usable']} are usable and "
                f"{least} to {most} held",
                figures=figures,
            )
        # The ledger keeps whole pages.
        if not 0 <= _LIMIT - memory.get(f"{moment}: limit", 0) < _PAGE:
            raise CheckFailed(
                f"config.yaml sets a limit of {_LIMIT} bytes, /api/ps shows {memory.get(f'{moment}: limit')}",
                figures=figures,
            )
        held = sum(memory[f"{moment}: {kind}"] for kind in ("ledger", "weights", "compute"))
        if abs(memory[f"{moment}: size"] - held) * _LOG_SHARE > held:
            raise CheckFailed(
                f"after a {moment} prompt /api/ps says the model's size is {memory[f'{moment}: size']} bytes, the "
                f"ledger {held}",
                figures=figures,
            )
        most = memory[f"{moment}: lease"] + mapped + memory[f"{moment}: compute"]
        if memory[f"{moment}: charge"] > most:
            raise CheckFailed(
                f"after a {moment} prompt {memory[f'{moment}: charge']} bytes are charged: more than lease, KV cache "
                f"and compute buffers together ({most}), so weights are counted twice",
                figures=figures,
            )
    reserved = memory["short: kv_reserved"]
    whole = model.cache_bytes(CONTEXT)
    if not whole <= reserved <= whole * 1.1:
        raise CheckFailed(f"{reserved} bytes reserved for a cache of {whole}", figures=figures)
    short, long = memory["short: kv_mapped"], memory["long: kv_mapped"]
    if short * _START_SHARE > reserved or long < model.cache_bytes(_LONG_CELLS):
        raise CheckFailed(
            f"{short} bytes mapped after a short prompt, {long} after a long one", figures=figures
        )
    return Outcome(f"{short}, then {long} of {reserved} bytes mapped", figures)


def _limited(install: Install, folder: Path, name: str, limit: str) -> Instance:
    return Instance(install=install, folder=folder, name=name, settings={ENABLED: "true", MEMORY: limit})


def _turns(install: Install, folder: Path, talk: Talk) -> Outcome:
    """There is room for one of them: each has the other sleep, and both stay loaded."""
    limit = talk.memory["short: charge"] * 3 // 2
    pids: list[tuple[int, ...]] = []
    with serve(_limited(install, folder, "turns", f"{limit / 1e9:.6f}").spec(), folder) as server:
        for model in (_FIRST, _SECOND, _FIRST):
            text, before = generate(server, model, _SHORT, _TOKENS), talk.texts[f"{model}, turn 2"]
            if text != before:
                raise server.failed(f"{model} answered {text[:80]!r}, without a tight limit {before[:80]!r}")
            left = loaded(server)
            states = {name: (one.kv or {}).get("state") for name, one in left.items()}
            charge = sum(one.bytes(server, "charge") for one in left.values())
            if charge > limit or any((state == "awake") != (name == model) for name, state in states.items()):
                raise server.failed(f"limit {limit}, {model} was asked: {states}, charged {charge} bytes")
            pids.append(children(server))
        if states[_SECOND] != "asleep" or len(pids[1]) != 2 or pids[2] != pids[1]:
            raise server.failed(f"one should sleep and none start anew: {states}, processes {pids}")
        for model in (_SECOND, _FIRST):
            stop(server, model)
        wait_gone(server, [_FIRST, _SECOND])
    return Outcome(f"one of two awake at a time within {limit} bytes", {"limit": limit})


def _refused(install: Install, folder: Path, limit: str, words: tuple[str, ...]) -> Outcome:
    instance = _limited(install, folder, "limit", limit)
    with serve(instance.spec(), folder) as server:
        body = {"model": _FIRST, "prompt": "ba", "raw": True, "stream": False}
        answer = server.request("POST", "/api/generate", json=body)
        if answer.status_code < 400:
            raise server.failed(f"with {MEMORY}={limit} the model was loaded (status {answer.status_code})")
        try:
            message = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError) as error:
            raise server.failed(f"the refusal is no JSON error: {answer.text[:300]}") from error
        lacks = [word for word in words if word not in message]
        if lacks:
            raise server.failed(f"the API error does not name {', '.join(lacks)}: {message}")
        told = [line for line in _after_start(server.log_text()).splitlines() if "kvcached: " in line]
        if not any("refused" in line and "limit" in line for line in told):
            raise server.failed("the log does not show the refusal")
        if loaded(server):
            raise server.failed("/api/ps lists a model that was refused")
        wait_gone(server, [_FIRST])
    return Outcome(f"status {answer.status_code}: {message}", {"status": answer.status_code})


def _after_start(log: str) -> str:
    """The log without the lines that list settings at start."""
    return log[log.find("Listening on") :]


def _refuses(instance: Instance, needle: str) -> Outcome:
    spec = instance.spec()
    status, text = start_and_wait_end(spec, instance.folder, seconds=20.0)
    saying = [line for line in text.splitlines() if needle in line and "server config" not in line]
    if status == 0 or not saying:
        raise CheckFailed(
            f"ended with status {status}, {len(saying)} lines name {needle!r}", logs={spec.name: tail(text)}
        )
    return Outcome(f"status {status}: {saying[0].strip()[:200]}", {"status": status})
