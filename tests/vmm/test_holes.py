"""How much memory reading would allocate, in a real process with memory in files."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mtetool.guest import Extent
from mtetool.spans import Place
from mtetool.vmm.holes import bytes_to_be_made
from mtetool.vmm.hostmemory import HostMemory
from mtetool.vmm.pagemap import Pagemap

MIB = 1 << 20
BASE = 0x4000_0000

# Maps what its arguments say, KIND:MIB:TOUCHED in MiB; prints the addresses, and waits.
_PROCESS = """
import ctypes, mmap, os, sys
kept = []
for word in sys.argv[1:]:
    kind, size, touched = word.split(":")
    size, touched = int(size) << 20, int(touched) << 20
    if kind in ("memfd", "copied"):
        fd = os.memfd_create("guest")
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED if kind == "memfd" else mmap.MAP_PRIVATE)
    else:
        sharing = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
        memory = mmap.mmap(-1, size, sharing | mmap.MAP_ANONYMOUS)
    for at in range(0, touched, mmap.PAGESIZE):
        memory[at] = 1
    kept.append(memory)
    print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@contextmanager
def process(*words: str) -> Iterator[tuple[int, list[int]]]:
    """Start a process with such memory; yield its PID and the addresses."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _PROCESS, *words]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as running:
        assert running.stdout
        addresses = [int(running.stdout.readline()) for _ in words]
        yield running.pid, addresses
        running.communicate("")


@pytest.mark.parametrize(
    ("words", "guest_mib", "made_mib"),
    [
        (["private:64:3"], 64, 0),
        (["memfd:64:3"], 64, 61),
        (["shared:64:3"], 64, 61),
        (["copied:64:3"], 64, 61),
        (["memfd:64:64"], 64, 0),
        # This memory cannot be the guest's: all of it together is smaller.
        (["private:64:0", "memfd:32:0"], 64, 0),
        # This can be a part of it.
        (["memfd:32:0", "memfd:32:8"], 64, 56),
        (["memfd:32:32", "memfd:32:8"], 64, 24),
        # At most as much as is read.
        (["memfd:64:0"], 8, 8),
    ],
)
def test_memory_of_which_nobody_knows_where_it_is(
    words: list[str], guest_mib: int, made_mib: int
) -> None:
    with process(*words) as (pid, _):
        assert bytes_to_be_made(pid, None, [Extent(BASE, guest_mib * MIB)]) == made_mib * MIB


def test_memory_whose_place_is_known_is_left_alone() -> None:
    with process("memfd:16:3", "memfd:8:1") as (pid, (one, other)):
        pagemap = Pagemap(pid)
        whole = [Extent(BASE, 24 * MIB)]
        both = HostMemory(
            pagemap, [Place(BASE, 16 * MIB, one), Place(BASE + 16 * MIB, 8 * MIB, other)]
        )
        assert bytes_to_be_made(pid, both, whole) == 0
        # The place of the rest is unknown: it can only be the other mapping.
        first = HostMemory(pagemap, [Place(BASE, 16 * MIB, one)])
        assert bytes_to_be_made(pid, first, whole) == 7 * MIB
        # Either can be the place: pages that exist in one are read, even if it is the other.
        either = HostMemory(pagemap, [Place(BASE, 8 * MIB, one), Place(BASE, 8 * MIB, other)])
        assert bytes_to_be_made(pid, either, [Extent(BASE, 8 * MIB)]) == 2 * MIB
        pagemap.close()


def test_a_process_that_is_gone() -> None:
    assert bytes_to_be_made(1 << 30, None, [Extent(BASE, MIB)]) == 0


def test_small_memory_is_not_looked_for() -> None:
    with process("memfd:16:0") as (pid, _):
        assert bytes_to_be_made(pid, None, [Extent(BASE, mmap.PAGESIZE)]) == 0
