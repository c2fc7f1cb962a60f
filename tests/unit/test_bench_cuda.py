"""The bench's own use of the CUDA driver, on one that is none: how much ballast is held, and that copies are copies."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvpatch.bench import cuda
from kvpatch.errors import ToolchainError

# Memory of 16 GiB that only counts, but for what is copied.
DRIVER = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr;
static size_t used, last_size; static void *last;
int cuInit(unsigned f) { return f != 0; }
int cuDeviceGet(int *d, int n) { *d = 7; return n; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &used; used = 512ul << 20; return d != 7; }
int cuCtxSetCurrent(void *c) { return c != &used; }
int cuGetErrorName(int e, const char **s) { *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN"; return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *t = 16ul << 30; *f = *t - used; return 0; }
int cuMemAlloc_v2(ptr *p, size_t n) {
    if (used + n > 16ul << 30) return 2;
    used += n; *p = 0x100000;
    if (n <= 1 << 20) { last = malloc(n); last_size = n; *p = (ptr) last; }
    return 0;
}
int cuMemFree_v2(ptr p) { used -= last_size; free((void *) p); return 0; }
int cuMemHostAlloc(void **p, size_t n, unsigned f) { *p = f == 1 ? malloc(n) : 0; return *p ? 0 : 1; }
int cuMemFreeHost(void *p) { free(p); return 0; }
int cuMemcpyHtoDAsync_v2(ptr d, const void *h, size_t n, void *s) { memcpy((void *) d, h, n); return s != 0; }
int cuStreamSynchronize(void *s) { return s != 0 || !last || ((char *) last)[last_size - 1] != 0x5A; }
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "driver.c"
    source.write_text(DRIVER, encoding="utf-8")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    # The processes that hold and measure are started with this environment.
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))


@pytest.mark.usefixtures("driver")
def test_the_ballast_leaves_what_was_asked_and_ends_with_its_block() -> None:
    leave = 3_000_000_000
    with cuda.ballast(leave) as held:
        assert leave <= held["free"] < leave + (2 << 20)
        assert held["held"] == held["total"] - held["free"] - (512 << 20)


@pytest.mark.usefixtures("driver")
def test_the_rate_is_of_copies_that_happened() -> None:
    rates = cuda.pinned_rate(size=1 << 20, times=3)
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates)


@pytest.mark.usefixtures("driver")
def test_what_the_driver_refuses_is_named() -> None:
    with pytest.raises(ToolchainError, match="no 68719476736 bytes left"):
        cuda.pinned_rate(size=64 << 30, times=1)


def test_without_a_driver_the_hint_is_the_other_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ToolchainError) as caught:
        cuda.Driver()
    assert caught.value.hint == "use --device cpu"
