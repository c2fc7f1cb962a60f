"""The drivers' figures: from NVML, which is a small library of ours here, from nvidia-smi, from the kernel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvpatch.pools import Driver, Drivers, driver
from tests.unit.pools.kit import BUS, UUID

NVML = f"""
#include <stdio.h>
#include <string.h>
typedef struct {{ unsigned long long total, free, used; }} memory;
typedef struct {{ char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; }} pci;
static int cards[2];
int nvmlInit_v2(void) {{ return FAILS; }}
int nvmlDeviceGetCount_v2(unsigned *n) {{ *n = 2; return 0; }}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) {{ *out = &cards[i]; return i == 1 ? 15 : 0; }}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {{
  *out = &cards[1];
  return strcmp(uuid, "MIG-11111111-0b5d-4e3f-9a6b-7c8d9e0f1a2b") != 0;
}}
int nvmlDeviceGetMemoryInfo(void *card, memory *out) {{
  *out = (memory){{.total = 1000, .free = card == &cards[0] ? 300 : 400, .used = 650}};
  return 0;
}}
int nvmlDeviceGetUUID(void *card, char *out, unsigned size) {{
  snprintf(out, size, "GPU-{UUID.upper()}");
  return 0;
}}
int nvmlDeviceGetName(void *card, char *out, unsigned size) {{ snprintf(out, size, "Test Card"); return 0; }}
int nvmlDeviceGetPciInfo_v3(void *card, pci *out) {{ strcpy(out->bus_id, "0000{BUS.upper()}"); return 0; }}
"""


@pytest.fixture
def nvml(tmp_path: Path) -> Path:
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler on PATH")
    source = tmp_path / "nvml.c"
    source.write_text(NVML, encoding="utf-8")
    for name, fails in (("nvml.so", 0), ("fails.so", 9)):
        argv = [cc, "-shared", "-fPIC", f"-DFAILS={fails}", "-o", str(tmp_path / name), str(source)]
        subprocess.run(argv, check=True)
    return tmp_path / "nvml.so"


def test_nvml(nvml: Path) -> None:
    drivers = Drivers(nvml=str(nvml), smi=None)
    (gpu,) = drivers.gpus()  # the other card fails, and is left out
    assert (gpu.uuid, gpu.bus_id, gpu.name) == (UUID, BUS, "Test Card")
    assert gpu.memory == Driver(used=700, total=1000, source="NVML")
    find = driver.finder(drivers)
    assert find(UUID) == find(BUS) == gpu
    instance = find("11111111-0b5d-4e3f-9a6b-7c8d9e0f1a2b")
    assert instance is not None
    assert instance.memory.used == 600
    assert find("22222222-0b5d-4e3f-9a6b-7c8d9e0f1a2b") is None
    assert driver.facts(BUS, find, drivers) == {"name": "Test Card", "driver": gpu.memory}


def test_an_nvml_that_does_not_start(nvml: Path, tmp_path: Path) -> None:
    smi(tmp_path, f"echo 'GPU-{UUID}, 0000{BUS.upper()}, A Card, 80, 60'; echo 'GPU-x, y, z, [N/A], [N/A]'")
    drivers = Drivers(nvml=str(tmp_path / "fails.so"), smi=str(tmp_path / "smi"))
    (gpu,) = drivers.gpus()
    assert (gpu.uuid, gpu.bus_id, gpu.name) == (UUID, BUS, "A Card")
    assert gpu.memory == Driver(used=20 << 20, total=80 << 20, source="nvidia-smi")
    assert drivers.instance(UUID) is None


def smi(folder: Path, text: str) -> None:
    (folder / "smi").write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / "smi").chmod(0o755)


def test_no_driver(tmp_path: Path, drivers: Drivers) -> None:
    smi(tmp_path, "exit 9")
    failing = Drivers(nvml=str(tmp_path / "none.so"), smi=str(tmp_path / "smi"))
    assert failing.gpus() == drivers.gpus() == ()
    find = driver.finder(drivers)
    assert driver.facts(UUID, find, drivers) == {"name": "", "driver": None}


def test_the_host(drivers: Drivers, tmp_path: Path) -> None:
    told = drivers.host()
    assert told is not None
    assert (told.used, told.total) == (100 * 1024, 1000 * 1024)
    (tmp_path / "meminfo").write_text("MemTotal: many\n", encoding="ascii")
    assert drivers.host() is None
    assert Drivers(nvml="none.so", smi=None).host() is not None  # this machine's own
