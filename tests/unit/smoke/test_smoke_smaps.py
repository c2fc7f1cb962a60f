from __future__ import annotations

import mmap
import os

import pytest

from kvpatch.smoke import smaps
from kvpatch.smoke.smaps import Range, Usage

_TEXT = """\
00400000-00402000 r-xp 00000000 08:01 12345                              /usr/bin/with space
Size:                  8 kB
Rss:                   4 kB
Swap:                  0 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0000010000 rw-p 00000000 00:00 0
Size:                 64 kB
Rss:                  24 kB
Pss:                  24 kB
Swap:                  4 kB
7f0000010000-7f0000020000 ---p 00000000 00:00 0
Size:                 64 kB
Rss:                   0 kB
Swap:                  0 kB
"""


def test_parse() -> None:
    program, used, hole = smaps.parse(_TEXT)
    assert (program.start, program.end, program.name) == (0x400000, 0x402000, "/usr/bin/with space")
    assert (used.perms, used.rss, used.swap, used.name) == ("rw-p", 24 * 1024, 4 * 1024, "")
    assert used.usable
    assert not hole.usable
    assert not program.usable


def test_parse_refuses_other_texts() -> None:
    with pytest.raises(ValueError, match="not an smaps text"):
        smaps.parse("Name: bash\n")
    assert smaps.parse("") == ()


def test_usage_of_whole_mappings_is_exact() -> None:
    found = smaps.usage(smaps.parse(_TEXT), [Range(start=0x7F0000000000, size=0x20000)])
    assert found == Usage(size=0x20000, usable=0x10000, held_min=28 * 1024, held_max=28 * 1024)


def test_usage_of_a_part_is_bounded() -> None:
    # 16 of the mapping's 64 KiB are asked about; of the 28 KiB held, none must lie there, 16 KiB may.
    found = smaps.usage(smaps.parse(_TEXT), [Range(start=0x7F0000000000, size=16 * 1024)])
    assert found == Usage(size=16 * 1024, usable=16 * 1024, held_min=0, held_max=16 * 1024)
    # 48 of 64: at least 12 KiB must lie there.
    found = smaps.usage(smaps.parse(_TEXT), [Range(start=0x7F0000000000, size=48 * 1024)])
    assert (found.held_min, found.held_max) == (12 * 1024, 28 * 1024)


def test_usage_sums_ranges_and_skips_others() -> None:
    ranges = [Range(start=0x7F0000000000, size=4096), Range(start=0x7F0000008000, size=4096)]
    assert smaps.usage(smaps.parse(_TEXT), ranges).usable == 8192
    assert smaps.usage(smaps.parse(_TEXT), [Range(start=0x1000, size=4096)]).usable == 0


def test_the_test_process_itself() -> None:
    import ctypes

    pages = 64
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        view = ctypes.c_char.from_buffer(area)
        place = Range(start=ctypes.addressof(view), size=pages * mmap.PAGESIZE)
        before = smaps.usage(smaps.read(os.getpid()), [place])
        for page in range(pages // 2):
            area[page * mmap.PAGESIZE] = 1
        after = smaps.usage(smaps.read(os.getpid()), [place])
        whole = next(m for m in smaps.read(os.getpid()) if m.start <= place.start < m.end)
        run = smaps.longest_present_run(os.getpid(), whole)
        del view
    assert before.usable == after.usable == place.size
    assert after.held_max >= pages // 2 * mmap.PAGESIZE
    assert after.held_min <= place.size
    assert after.held_max > before.held_min
    assert run >= pages // 2 * mmap.PAGESIZE


def test_a_process_that_has_ended() -> None:
    with pytest.raises(OSError, match=r"No such (file|process)"):
        smaps.read(2**22 + 1)
