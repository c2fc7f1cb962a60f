"""Which processes a command is for, by model name, pid or slot, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpatch.errors import UsageError
from kvpatch.pools import errors, files
from kvpatch.pools.choose import Wish
from kvpatch.pools.driver import HOST
from kvpatch.pools.ledgers import Opened
from kvpatch.pools.ollama import Ollama
from kvpatch.pools.service import Service
from kvpatch.runtime import CallError, Command, LimitResult, Slot

CARD = "all groups together"
_WAYS_OUT = {
    "KVCACHED_E_BUSY": "it is in use: try again when it is idle",
    "KVCACHED_E_SLOT": "no process with a control thread is there (any more): `kvpatch top --once` shows who is",
    "KVCACHED_E_TIMEOUT": "it may be stopped, or hang: look at its log; --wait SECONDS gives it longer",
    "KVCACHED_E_LIMIT": "the limit leaves no room: put another to sleep, or raise it (kvpatch limit)",
    "KVCACHED_E_NOMEM": "the device has no room: put another to sleep",
    "KVCACHED_E_HOST_LIMIT": "the host memory for what sleeps is used up: raise OLLAMA_KVCACHED_HOST_MEMORY_GB",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one process did. `error` "": it was done, and `freed` bytes were given back."""

    device: str
    slot: int
    pid: int
    name: str
    command: str
    freed: int = 0
    error: str = ""
    message: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitOutcome:
    """A limit that was set. `overage` above 0: in force, but more is in use."""

    device: str
    group: str | None
    limit: int | None
    charge: int
    overage: int
    revision: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Target:
    """A slot of an open ledger."""

    opened: Opened
    slot: Slot

    @property
    def label(self) -> str:
        return f"{self.slot.name} (pid {self.slot.pid}, slot {self.slot.slot} on {self.opened.file.device})"


def on_device(opened: Sequence[Opened], device: str | None) -> tuple[Opened, ...]:
    """The ledgers of one device, given by its id or the beginning of it; None: all. Raises UsageError."""
    if device is None:
        return tuple(opened)
    wanted = device.lower().removeprefix("gpu-").removeprefix("mig-")
    found = tuple(one for one in opened if one.file.device.startswith(wanted))
    if not wanted or len({one.file.device for one in found}) != 1:
        known = ", ".join(sorted({one.file.device for one in opened}))
        many = "more than one device" if wanted and found else "no device with a ledger"
        raise UsageError(f"--device {device!r} is {many}", hint=f"there are: {known or 'none'}")
    return found


def select(opened: Sequence[Opened], words: Sequence[str], command: Command) -> tuple[Target, ...]:
    """The processes that the words name; none: all that answer commands. Raises TargetError."""
    every = [Target(one, slot) for one in opened for slot in one.ledger.slots()]
    if not words:
        able = tuple(target for target in every if target.slot.controlled)
        if not able:
            raise errors.NoPoolsError(
                f"there is no process that could {command.name.lower()}",
                hint="`kvpatch top --once` shows who is there; a lease without its process answers nothing",
            )
        return able
    chosen: dict[tuple[str, int], Target] = {}
    for word in words:
        for target in _named(every, word):
            chosen[str(target.opened.path), target.slot.slot] = target
    return tuple(chosen.values())


def carry_out(targets: Sequence[Target], command: Command, *, wait_ms: int) -> tuple[Outcome, ...]:
    """Command each of them in turn, whether or not the one before could."""
    done = []
    for target in targets:
        slot = target.slot
        freed, error, message, hint = 0, "", "", ""
        try:
            freed = target.opened.ledger.command(slot.slot, command, wait_ms=wait_ms)
        except CallError as failure:
            error = failure.name or "failed"
            message = f"{target.label}: {failure.sentence or failure.message}"
            message += f" ({failure.detail})" if failure.detail else ""
            hint = _WAYS_OUT.get(failure.name, failure.hint or "")
        done.append(
            Outcome(
                device=target.opened.file.device,
                slot=slot.slot,
                pid=slot.pid,
                name=slot.name,
                command=command.name.lower(),
                freed=freed,
                error=error,
                message=message,
                hint=hint,
            )
        )
    return tuple(done)


def require_done(outcomes: Sequence[Outcome]) -> None:
    """Raise RefusedError when one of them did not do it."""
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        done = f" ({len(outcomes) - len(failed)} of {len(outcomes)} did it)" if len(outcomes) > 1 else ""
        raise errors.RefusedError(
            f"cannot {failed[0].command}{done}: " + "; ".join(outcome.message for outcome in failed),
            hint="; ".join(dict.fromkeys(outcome.hint for outcome in failed if outcome.hint)) or None,
            data={"outcomes": [outcome.to_json() for outcome in outcomes]},
        )


def set_limit(
    opened: Sequence[Opened], group: str | None, limit: int | None, *, card: bool
) -> tuple[LimitOutcome, ...]:
    """Set the limit of a group (None: of the only one), or of the card. Raises TargetError, RefusedError, CallError.

    On GPUs where the group is on one, else on the host: memory beside GPUs has a limit of its own.
    """
    if card:
        return tuple(_set(one, None, limit) for one in _where_wanted(opened))
    groups = {one.path: {slot.group for slot in one.ledger.slots()} for one in opened}
    wanted = _one_group(sorted(set().union(*groups.values())), group)
    return tuple(
        _set(one, wanted, limit)
        for one in _where_wanted([one for one in opened if wanted in groups[one.path]])
    )


def set_limit_of_service(
    service: Service, group: str | None, limit: int | None, *, card: bool, device: str | None
) -> tuple[LimitOutcome, ...]:
    """The same over the service's socket. Raises TargetError, UsageError, PoolsError."""
    devices = service.look().devices
    if device is not None:
        devices = tuple(one for one in devices if one.id.startswith(device.lower()))
        if len(devices) != 1:
            raise UsageError(f"--device {device!r} is not one device of the service at {service.path}")
    if not card:
        known = sorted({found.name for one in devices for found in one.groups})
        group = _one_group(known, group)
        devices = tuple(one for one in devices if group in {found.name for found in one.groups})
    gpus = tuple(one for one in devices if one.id != HOST)
    done = []
    for one in gpus or devices:
        told = service.set_limit(one.id, None if card else group, limit)
        done.append(
            LimitOutcome(
                device=one.id,
                group=None if card else group,
                limit=None if told["bytes"] < 0 else told["bytes"],
                charge=told["charge"],
                overage=told["overage"],
                revision=told["revision"],
            )
        )
    return tuple(done)


def only_shown(source: Ollama, wish: Wish) -> errors.DeniedError:
    """The error for a command where only Ollama's own report can be seen."""
    strangers = [file for file in files.find() if not file.ours]
    if strangers:
        return errors.denied(strangers[0].path, strangers[0].owner, wish.command)
    return errors.DeniedError(
        f"{source.url} only shows its models: it takes no {wish.command}",
        hint="run this on the server's machine, as the user that runs it",
    )


def _one_group(known: Sequence[str], group: str | None) -> str:
    """The group that is meant. Raises NoPoolsError, TargetError."""
    if not known:
        raise errors.NoPoolsError(
            "no group has a process, and the limit of a group ends with its last one",
            hint="a limit of the card lasts: --card; a server's own is OLLAMA_KVCACHED_MEMORY_GB",
        )
    if group is None and len(known) > 1:
        raise errors.TargetError(
            f"there are {len(known)} groups: {', '.join(known)}",
            hint="say which: --group NAME, or --card for all",
        )
    wanted = known[0] if group is None else group
    if wanted not in known:
        raise errors.TargetError(f"no process is in group {wanted!r}", hint=f"there are: {', '.join(known)}")
    return wanted


def _where_wanted(opened: Sequence[Opened]) -> list[Opened]:
    gpus = [one for one in opened if one.file.device != HOST]
    return gpus or list(opened)


def _set(one: Opened, group: str | None, limit: int | None) -> LimitOutcome:
    result = one.ledger.set_limit(group, limit)
    if result.result not in (LimitResult.APPLIED, LimitResult.DEFERRED):
        raise errors.RefusedError(
            f"the limit of {group or CARD} on {one.file.device} stays as it was: another was set meanwhile, or the "
            f"highest revision is in force ({result.result.name.lower()}, revision {result.revision})",
            hint="try again; a limit of the highest revision ends with its group",
        )
    return LimitOutcome(
        device=one.file.device,
        group=group,
        limit=result.limit,
        charge=result.charge,
        overage=result.overage,
        revision=result.revision,
    )


def _named(every: Sequence[Target], word: str) -> list[Target]:
    """The slots of the one process that a word names: `pid:N`, `slot:N`, a number that is either, or a model."""
    kind, colon, rest = word.partition(":")
    if colon and kind in ("pid", "slot") and rest.isdigit():
        number = int(rest)
        found = [t for t in every if (t.slot.pid if kind == "pid" else t.slot.slot) == number]
    elif word.isdigit():
        found = [t for t in every if int(word) in (t.slot.pid, t.slot.slot)]
    else:
        found = _by_name(every, word)
    if not found:
        there = ", ".join(dict.fromkeys(target.label for target in every)) or "nobody"
        raise errors.TargetError(f"{word!r} names no process", hint=f"there are: {there}")
    # One process on several devices is one; a slot's number is one device's.
    if len({(t.slot.pid, t.slot.name) for t in found}) > 1:
        raise errors.TargetError(
            f"{word!r} names more than one process: " + ", ".join(target.label for target in found),
            hint="name each as pid:" + " pid:".join(dict.fromkeys(str(target.slot.pid) for target in found)),
        )
    return found


def _by_name(every: Sequence[Target], word: str) -> list[Target]:
    """By the whole name, then with the tag that Ollama leaves out, then by its beginning."""
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: name == word,
        lambda name: name == f"{word}:latest",
        lambda name: name.lower().startswith(word.lower()),
    )
    for matches in rules:
        found = [target for target in every if matches(target.slot.name)]
        if found:
            return found
    return []
