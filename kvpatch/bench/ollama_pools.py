"""What `kvpatch top` shows of a patched server under measurement, and whether the driver agrees."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvpatch import pools
from kvpatch.bench.ollama_servers import Setup, Talker
from kvpatch.errors import KvpatchError
from kvpatch.pools import Device, Drivers
from kvpatch.pools.files import VARIABLE
from kvpatch.runtime import load
from kvpatch.smoke.report import CheckFailed

# A process measures what its context holds when it has been idle for a second.
_MEASURED_AFTER = 1.5
_MEASURED_WITHIN = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Bytes: held through the library, by the contexts that are listed with it, and in use by the driver in all."""

    ledger: int
    contexts: int
    driver: int

    def gap(self, before: int) -> float:
        """How far the two are apart, as a part of what the driver counts since `before`."""
        used = self.driver - before
        return abs(self.ledger + self.contexts - used) / used if used > 0 else 1.0


def device(setup: Setup, one: Talker) -> Device:
    """The device of the models, as `kvpatch top --once --json` has it. Raises CheckFailed when it shows none."""
    try:
        source = pools.source(
            pools.Wish(by="ledger"),
            lambda: load(setup.patched.root),
            Drivers(),
            environ={VARIABLE: str(setup.instance(one.side).ledger)},
        )
        try:
            view = source.look()
        finally:
            source.close()
    except KvpatchError as error:
        raise CheckFailed(f"the ledger shows nothing: {error.message}", logs=one.server.logs()) from error
    found = [one for one in view.devices if (one.id != "host") == setup.on_gpu and one.pools]
    if len(found) != 1:
        raise CheckFailed(f"models are on {len(found)} devices, not on one", logs=one.server.logs())
    return found[0]


def look(setup: Setup, one: Talker) -> Look:
    """Raises CheckFailed when a figure is missing, or a process's context is not measured in time."""
    if setup.on_gpu:
        time.sleep(_MEASURED_AFTER)
    end = time.monotonic() + _MEASURED_WITHIN
    found = device(setup, one)
    while setup.on_gpu and not all(pool.context_bytes for pool in found.pools):
        if time.monotonic() > end:
            raise CheckFailed(f"a context is not measured: {found.to_json()}", logs=one.server.logs())
        time.sleep(0.1)
        found = device(setup, one)
    if found.mapped is None or found.driver is None:
        raise CheckFailed(f"{found.id}: a figure is missing: {found.to_json()}", logs=one.server.logs())
    return Look(ledger=found.mapped, contexts=found.context_bytes, driver=found.driver.used)


def asleep_bytes(setup: Setup, one: Talker) -> tuple[list[int], list[int]]:
    """Weights and KV of each model that sleeps: what a wake copies."""
    sleeping = [pool for pool in device(setup, one).pools if pool.asleep]
    return [pool.weights_asleep or 0 for pool in sleeping], [pool.kv_asleep or 0 for pool in sleeping]


def driver_used(setup: Setup) -> int:
    """In use by everybody, as the driver of the models' device tells it."""
    drivers = Drivers()
    if setup.on_gpu:
        gpus = drivers.gpus()
        if gpus:
            return gpus[0].memory.used
    elif (host := drivers.host()) is not None:
        return host.used
    raise CheckFailed("the driver does not tell how much is in use")
