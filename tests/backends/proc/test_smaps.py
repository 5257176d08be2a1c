"""A process's tagged memory, from the kernel's description of it."""

from __future__ import annotations

import os

import pytest

from mtetool.backends.proc.smaps import AddressSpace, as_memslots, tagged_mappings
from mtetool.errors import NoSuchProcessError
from mtetool.guest import Memslot

# As Linux 6.12 prints it, without most lines of each mapping.
_SMAPS = """\
00400000-0048b000 r-xp 00000000 fe:10 239                                /run/lab/a-b: c
Rss:                 496 kB
VmFlags: rd ex mr mw me
10000000-10010000 rw-p 00000000 00:00 0
Rss:                  64 kB
VmFlags: rd wr mr mw me ac mt
10010000-10020000 rw-p 00000000 00:00 0                                  [anon: mt]
VmFlags: rd wr mr mw me ac nh mt
10020000-10030000 r--p 00000000 00:00 0
VmFlags: rd mr mw me ac mt
10030000-10040000 rw-s 00000000 00:01 2                                  /memfd:tagged (deleted)
VmFlags: rd wr sh mr mw me ms mt
10040000-10050000 r--s 00000000 00:01 2                                  /memfd:tagged (deleted)
VmFlags: rd sh mr mw me ms mt
20000000-20010000 rw-p 00000000 00:01 3                                  /memfd:copied (deleted)
VmFlags: rd wr mr mw me ac mt
20010000-20020000 ---p 00000000 00:00 0
VmFlags: mr mw me nr
20020000-20030000 ---p 00000000 00:00 0
VmFlags: mr mw me ac mt
20030000-20040000 --xp 00000000 00:00 0
VmFlags: ex mr mw me ac mt
20200000-20400000 r--p 00000000 00:0f 9                                  /anon_hugepage (deleted)
VmFlags: rd mr mw me de ht mt
ffff00000000-ffff00010000 -w-p 00000000 00:00 0
VmFlags: wr mr mw me ac mt
"""


def test_memslots_are_the_mappings_with_tags() -> None:
    size = 0x10000
    assert as_memslots(tagged_mappings(_SMAPS.splitlines(keepends=True))) == (
        # Private memory takes tags whatever its protection: these are joined into one.
        Memslot(0, 0x10000000, 3 * size),
        Memslot(1, 0x10030000, size),
        Memslot(2, 0x10040000, size, readonly=True),
        Memslot(3, 0x20000000, size),
        Memslot(4, 0x20020000, 2 * size, kind="device"),
        Memslot(5, 0x20200000, 0x200000, readonly=True),
        Memslot(6, 0xFFFF00000000, size),
    )


def test_no_mapping_has_tags() -> None:
    text = _SMAPS.replace(" mt\n", "\n")
    assert as_memslots(tagged_mappings(text.splitlines(keepends=True))) == ()


def test_what_this_process_may_read_itself() -> None:
    space = AddressSpace(os.getpid())
    try:
        space.check()
        assert space.tagged_mappings() == []
        assert space.accessible(0, 1 << 40) == 0
        assert space.accessible((1 << 64) - 4096, 8192) == 0
        at = id(space) // 4096 * 4096
        assert space.accessible(at, 4096) == 4096
        assert space.accessible(at, 16) == 16
        assert 4096 <= space.accessible(at, 1 << 62) < 1 << 47
    finally:
        space.close()
        space.close()


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(NoSuchProcessError):
        AddressSpace((1 << 22) - 1)
