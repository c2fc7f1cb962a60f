"""Raw driver calls, as witnesses that use nothing of ours: how fast the bus is, and a process that holds memory.

Both run in processes of their own (`python -m kvpatch.bench.cuda`), so that a benchmark's own process has no CUDA
context, which would itself hold half a gigabyte of the card.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from kvpatch.errors import ToolchainError

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARY = "libcuda.so.1"
_CHUNK = 1 << 30
_SMALL = 2 << 20


class Driver:
    """libcuda with the first device's primary context made current."""

    def __init__(self, device: int = 0) -> None:
        try:
            self._lib = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise ToolchainError(f"there is no CUDA driver: {error}", hint="use --device cpu") from error
        handle, context = c_int(), c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", byref(handle), device)
        self.call("cuDevicePrimaryCtxRetain", byref(context), handle)
        self.call("cuCtxSetCurrent", context)

    def call(self, function: str, *arguments: Any) -> None:
        """Raises ToolchainError with the driver's own name of the error."""
        rc = getattr(self._lib, function)(*arguments)
        if rc:
            name = ctypes.c_char_p()
            self._lib.cuGetErrorName(rc, byref(name))
            raise ToolchainError(f"{function}: {(name.value or b'').decode() or rc}")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def alloc(self, size: int) -> int | None:
        """Device memory, or None when there is not so much."""
        address = c_uint64()
        if self._lib.cuMemAlloc_v2(byref(address), c_size_t(size)):
            return None
        return address.value

    def rate(self, size: int, times: int) -> list[float]:
        """Bytes a second of each of `times` copies of `size` bytes from pinned host memory to the device."""
        device = self.alloc(size)
        if device is None:
            raise ToolchainError(f"the card has no {size} bytes left to measure copies with")
        host = c_void_p()
        self.call("cuMemHostAlloc", byref(host), c_size_t(size), 1)  # portable, as libkvcached pins its own
        ctypes.memset(host, 0x5A, size)
        rates = []
        for _ in range(times + 1):
            began = time.perf_counter()
            self.call("cuMemcpyHtoDAsync_v2", c_uint64(device), host, c_size_t(size), None)
            self.call("cuStreamSynchronize", None)
            rates.append(size / (time.perf_counter() - began))
        self.call("cuMemFree_v2", c_uint64(device))
        self.call("cuMemFreeHost", host)
        return rates[1:]  # the first one also warms up


def pinned_rate(size: int = _CHUNK, times: int = 10) -> list[float]:
    """As `Driver.rate`, by a process of its own."""
    argv = [sys.executable, "-m", __name__, "rate", "--size", str(size), "--times", str(times)]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolchainError(f"the bus could not be measured: {done.stderr.strip()[-500:]}")
    rates: list[float] = json.loads(done.stdout)
    return rates


@contextlib.contextmanager
def ballast(leave: int) -> Iterator[dict[str, int]]:
    """While the block runs, another process holds all of the card but `leave` bytes; gives {free, total, held}."""
    argv = [sys.executable, "-m", __name__, "ballast", "--leave", str(leave)]
    with subprocess.Popen(argv, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            if not line:
                raise ToolchainError("the ballast process ended before it held anything")
            yield json.loads(line)
        finally:
            child.stdin.close()  # it ends when its input does
            child.wait(30)


def _hold(leave: int) -> dict[str, int]:
    driver = Driver()
    held = 0
    size = _CHUNK
    while True:
        free, total = driver.memory()
        if free - leave < size:
            if size == _SMALL:
                return {"free": free, "total": total, "held": held}
            size = _SMALL if size // 8 < _SMALL else size // 8
            continue
        if driver.alloc(size) is None:
            return {"free": free, "total": total, "held": held}
        held += size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("rate", "ballast"))
    parser.add_argument("--size", type=int, default=_CHUNK)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--leave", type=int, default=20_000_000_000)
    given = parser.parse_args()
    if given.what == "rate":
        sys.stdout.write(json.dumps(Driver().rate(given.size, given.times)) + "\n")
        return
    sys.stdout.write(json.dumps(_hold(given.leave)) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
