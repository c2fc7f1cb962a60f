"""The servers of a run: an `ollama serve` of its own, what its processes are, and what it must not leave behind."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpatch import runtime
from kvpatch.runtime import Slot
from kvpatch.smoke.holdings import library
from kvpatch.smoke.install import Install
from kvpatch.smoke.ollama import Instance, children, create
from kvpatch.smoke.report import CheckFailed
from kvpatch.smoke.server import Server, serve
from tests.ollama_e2e.zoo import CONTEXT, Member

ENABLED, LIMIT, MAX_CTX = "OLLAMA_KVCACHED_ENABLED", "OLLAMA_KVCACHED_MEMORY_GB", "OLLAMA_KVCACHED_MAX_CTX"
HOST, SLEEP = "OLLAMA_KVCACHED_HOST_MEMORY_GB", "OLLAMA_KVCACHED_SLEEP_SECONDS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A llama-server. `model`: as its user calls it; `files`: what it has open below /dev/shm and temporary
    folders."""

    pid: int
    model: str
    files: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A server that runs. `names`: of models, by the digest in the name of their file."""

    server: Server
    instance: Instance
    names: Mapping[str, str]

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def temporary(self) -> Path:
        return temporary(self.instance)

    def children(self) -> tuple[Child, ...]:
        found = []
        for pid in children(self.server):
            with contextlib.suppress(OSError):  # ended meanwhile
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                model = words[words.index(b"--model") + 1].decode() if b"--model" in words else ""
                # Without a model it is one of the short-lived ones by which Ollama asks for devices.
                if model:
                    found.append(
                        Child(pid=pid, model=self._name(model), files=open_files(pid, self.instance.folder))
                    )
        return tuple(found)

    def _name(self, blob: str) -> str:
        return self.names.get(blob.rsplit("sha256-", 1)[-1], blob)

    def slots(self) -> tuple[Slot, ...]:
        return slots(self.instance)


def temporary(instance: Instance) -> Path:
    """Where the processes of an instance put temporary files: nobody else does."""
    return instance.folder / f"tmp-{instance.name}"


def slots(instance: Instance) -> tuple[Slot, ...]:
    """Those of an instance's ledgers."""
    found: list[Slot] = []
    for path in instance.ledger.parent.glob(f"{instance.ledger.name}*"):
        with runtime.Ledger(path, library=library(instance.install.root)) as ledger:
            found += ledger.slots()
    return tuple(found)


def open_files(pid: int, folder: Path) -> frozenset[str]:
    """Files below /dev/shm that a process has open or mapped, but for those in `folder`, which is the run's own. A
    deleted one goes with its last process."""
    found: set[str] = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(link.readlink()))
    with contextlib.suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        found.update(re.findall(r"(/dev/shm/.+)$", maps, re.MULTILINE))
    return frozenset(
        name
        for name in found
        if name.startswith("/dev/shm/")
        and not name.endswith("(deleted)")
        and folder not in Path(name).parents
    )


def stock_settings() -> dict[str, str]:
    """What both sides share: one request at a time in a model, so that an answer does not depend on who asks beside
    it."""
    return {"OLLAMA_NUM_PARALLEL": "1", "OLLAMA_KEEP_ALIVE": "30m"}


def elastic_settings(limit: int, **others: str) -> dict[str, str]:
    """Of the patched server. `limit`: bytes."""
    return {
        **stock_settings(),
        ENABLED: "true",
        LIMIT: f"{limit / 1e9:.9f}",
        MAX_CTX: str(CONTEXT),
        **others,
    }


def _blob(server: Server, member: Member) -> str:
    """The digest in the name of the file in which Ollama keeps a model: not that of ours, Ollama writes it anew."""
    shown = server.json("POST", "/api/show", json={"model": member.name})
    match = re.search(r"^FROM \S*sha256-([0-9a-f]+)", str(shown.get("modelfile")), re.MULTILINE)
    if match is None:
        raise server.failed(f"/api/show does not name the file of {member.name}: {str(shown)[:300]}")
    return match[1]


@contextlib.contextmanager
def start(
    install: Install, folder: Path, name: str, members: Sequence[Member], settings: Mapping[str, str]
) -> Iterator[Side]:
    """A server with these models, which it has or is given."""
    plain = Instance(install=install, folder=folder, name=name)
    temporary(plain).mkdir(parents=True, exist_ok=True)
    instance = Instance(
        install=install, folder=folder, name=name, settings={**settings, "TMPDIR": str(temporary(plain))}
    )
    with serve(instance.spec(), folder) as server:
        known = {
            str(model["name"]).removesuffix(":latest") for model in server.json("GET", "/api/tags")["models"]
        }
        for member in members:
            if member.name not in known:
                create(server, member.name, member.model)
        names = {_blob(server, member): member.name for member in members}
        yield Side(server=server, instance=instance, names=names)
        if server.returncode() is not None:
            raise CheckFailed(f"{name} ended by itself", logs=server.logs())


def left_behind(instance: Instance, files: frozenset[str]) -> list[str]:
    """What is left of a server that has ended; `files` are those its processes had open. That no process is left,
    `serve` has seen to."""
    problems = []
    if instance.ledger.exists():
        for slot in slots(instance):
            problems.append(
                f"slot {slot.slot} of the ledger is still {slot.name!r}'s, charged {slot.charge} bytes"
            )
    problems += [f"{name} is still there" for name in sorted(files) if Path(name).exists()]
    if temporary(instance).is_dir():
        problems += [f"{path} is still there" for path in sorted(temporary(instance).iterdir())]
    sockets = [path for path in instance.folder.rglob("*") if path.is_socket()]
    return problems + [f"socket {path} is still there" for path in sockets]
