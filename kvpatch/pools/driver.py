"""A device's memory as its driver tells it: NVML, else nvidia-smi; for the host, the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from ctypes import byref, c_char, c_char_p, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpatch.pools.model import Driver

MEMINFO = Path("/proc/meminfo")
HOST = "host"
NVML = "libnvidia-ml.so.1"
_SMI_SECONDS = 10
_NAME_BYTES = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU, or one of its MIG instances."""

    uuid: str  # without its prefix, lower case
    bus_id: str  # 0000:1b:00.0
    name: str
    memory: Driver


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _Pci(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = [
        ("bus_id_legacy", c_char * 16),
        ("domain", c_uint),
        ("bus", c_uint),
        ("device", c_uint),
        ("pci_device_id", c_uint),
        ("pci_subsystem_id", c_uint),
        ("bus_id", c_char * 32),
    ]


class Drivers:
    """The drivers' figures, asked anew each time. Where there is no driver, there are no figures."""

    def __init__(self, *, nvml: str = NVML, smi: str | None = "nvidia-smi", meminfo: Path = MEMINFO) -> None:
        self._library = _nvml(nvml)
        self._smi = shutil.which(smi) if smi is not None and self._library is None else None
        self._meminfo = meminfo

    def host(self) -> Driver | None:
        """Memory of this machine: what is not available counts as used."""
        try:
            lines = self._meminfo.read_text(encoding="ascii").splitlines()
            kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
            total = kib["MemTotal"] * 1024
            return Driver(used=total - kib["MemAvailable"] * 1024, total=total, source=str(self._meminfo))
        except (OSError, ValueError, IndexError, KeyError):
            return None

    def gpus(self) -> tuple[Gpu, ...]:
        """Every GPU that the driver lists; none where there is no driver, or it fails."""
        if self._library is not None:
            return _nvml_gpus(self._library)
        if self._smi is not None:
            return _smi_gpus(self._smi)
        return ()

    def instance(self, uuid: str) -> Gpu | None:
        """A MIG instance by its UUID: `gpus` does not list these."""
        if self._library is None:
            return None
        handle = c_void_p()
        wanted = c_char_p(f"MIG-{uuid}".encode())
        if self._library.nvmlDeviceGetHandleByUUID(wanted, byref(handle)) != 0:
            return None
        return _nvml_gpu(self._library, handle, uuid)


def finder(drivers: Drivers) -> Callable[[str], Gpu | None]:
    """Answers for one look at all devices, by UUID or PCI bus id; the drivers are asked once."""
    gpus = drivers.gpus()
    known: Mapping[str, Gpu] = {key: gpu for gpu in gpus for key in (gpu.uuid, gpu.bus_id)}
    return lambda device: known.get(device) or (drivers.instance(device) if gpus else None)


def facts(device: str, gpu: Callable[[str], Gpu | None], drivers: Drivers) -> dict[str, Any]:
    """A device's `name` and `driver`, for the one that a ledger or a service names so."""
    if device == HOST:
        return {"name": "this machine's memory", "driver": drivers.host()}
    found = gpu(device)
    return {"name": "" if found is None else found.name, "driver": None if found is None else found.memory}


def _nvml(name: str) -> Any:
    """NVML, started; None where it is not there or does not start."""
    try:
        library = ctypes.CDLL(name)
        start = library.nvmlInit_v2
    except (OSError, AttributeError):
        return None
    return library if start() == 0 else None


def _nvml_gpus(library: Any) -> tuple[Gpu, ...]:
    count = c_uint()
    if library.nvmlDeviceGetCount_v2(byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        handle = c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, byref(handle)) == 0:
            gpu = _nvml_gpu(library, handle, None)
            if gpu is not None:
                found.append(gpu)
    return tuple(found)


def _nvml_gpu(library: Any, handle: c_void_p, uuid: str | None) -> Gpu | None:
    memory, pci = _Memory(), _Pci()
    text, name = ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(_NAME_BYTES)
    if library.nvmlDeviceGetMemoryInfo(handle, byref(memory)) != 0:
        return None
    if uuid is None:
        if library.nvmlDeviceGetUUID(handle, text, _NAME_BYTES) != 0:
            return None
        uuid = _plain(text.value.decode("ascii", "replace"))
    with contextlib.suppress(AttributeError):  # an older NVML: the bus id stays unknown
        library.nvmlDeviceGetPciInfo_v3(handle, byref(pci))
    library.nvmlDeviceGetName(handle, name, _NAME_BYTES)
    return Gpu(
        uuid=uuid,
        bus_id=_short(pci.bus_id.decode("ascii", "replace")),
        name=name.value.decode("utf-8", "replace"),
        # Free and total, as contexts see them: `used` leaves out, in some drivers, what the driver keeps for itself.
        memory=Driver(used=memory.total - memory.free, total=memory.total, source="NVML"),
    )


def _smi_gpus(program: str) -> tuple[Gpu, ...]:
    try:
        done = subprocess.run(
            [program, "--query-gpu=uuid,pci.bus_id,name,memory.total,memory.free",
             "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=_SMI_SECONDS, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    found = []
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        try:
            uuid, bus, name, total, free = fields
            size, left = int(total) << 20, int(free) << 20
        except ValueError:  # a card that does not tell ("[N/A]")
            continue
        memory = Driver(used=size - left, total=size, source="nvidia-smi")
        found.append(Gpu(uuid=_plain(uuid), bus_id=_short(bus), name=name, memory=memory))
    return tuple(found)


def _plain(uuid: str) -> str:
    """A UUID as ledgers are named by it."""
    lower = uuid.lower()
    return lower[4:] if lower.startswith(("gpu-", "mig-")) else lower


def _short(bus_id: str) -> str:
    """A PCI bus id with a domain of four digits, as the kernel writes it: NVML writes eight."""
    domain, colon, rest = bus_id.lower().partition(":")
    return f"{domain.lstrip('0').rjust(4, '0')}{colon}{rest}"
