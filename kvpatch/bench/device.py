"""The device that models are on, as the bench sees it: how much of it a server holds, and how fast copies to it are."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvpatch.bench import cuda
from kvpatch.errors import ToolchainError, UsageError

DEVICES = ("cpu", "cuda")


class Cpu:
    """Ordinary memory: what a process holds of it is its anonymous memory (mapped files are the page cache's)."""

    name = "cpu"
    # Between two readings of a process that does nothing.
    noise = 4 << 20

    def held(self, pid: int) -> int:
        """Bytes that a process holds."""
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
        raise ToolchainError(f"/proc/{pid}/smaps_rollup does not say what is anonymous")

    def rates(self) -> list[float]:
        """Bytes a second of plain copies."""
        source = np.full(16 << 20, 7, dtype=np.uint8)
        target = np.zeros_like(source)
        found = []
        for _ in range(11):
            began = time.perf_counter()
            np.copyto(target, source)
            found.append(source.size / (time.perf_counter() - began))
        return found[1:]

    @contextlib.contextmanager
    def ballast(self, leave: int) -> Iterator[dict[str, int] | None]:
        """None: ordinary memory is not filled up for a measurement."""
        del leave
        yield None

    def facts(self) -> dict[str, str]:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return {"device": line.partition(":")[2].strip()}
        return {"device": "CPU"}


class Cuda:
    """The first NVIDIA card, by nvidia-smi."""

    name = "cuda"
    noise = 2 << 20

    def held(self, pid: int) -> int:
        """Bytes that a process holds by the driver's list of processes; where that does not name it (another pid
        namespace), what the whole card has in use."""
        for line in _smi("--query-compute-apps=pid,used_gpu_memory").splitlines():
            named, _, used = line.partition(",")
            if named.strip() == str(pid) and used.strip().isdigit():
                return int(used) << 20
        return self.used()

    def used(self) -> int:
        """Bytes in use by everybody."""
        return int(_smi("--query-gpu=memory.used").splitlines()[0]) << 20

    def rates(self) -> list[float]:
        """Bytes a second of copies from pinned host memory."""
        return cuda.pinned_rate()

    @contextlib.contextmanager
    def ballast(self, leave: int) -> Iterator[dict[str, int] | None]:
        with cuda.ballast(leave) as held:
            yield held

    def facts(self) -> dict[str, str]:
        name, driver, memory = (
            part.strip()
            for part in _smi("--query-gpu=name,driver_version,memory.total").splitlines()[0].split(",")
        )
        return {"device": name, "driver": driver, "memory": f"{memory} MiB"}


Device = Cpu | Cuda


def of_name(name: str) -> Device:
    """Raises UsageError for a name that there is not, ToolchainError where there is no such device."""
    if name == "cpu":
        return Cpu()
    if name == "cuda":
        device = Cuda()
        device.facts()
        return device
    raise UsageError(f"--device {name} is not known", hint=f"one of {', '.join(DEVICES)}")


def _smi(query: str) -> str:
    argv = ["nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(
            f"nvidia-smi does not answer: {error}", hint="use --device cpu, or install the driver"
        ) from error
