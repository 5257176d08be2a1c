"""Memory that can carry tags on this host: what files are, and what KVM accepts with MTE.

KVM's rules change: it accepts shared memory since Linux 6.2 and huge pages since 6.13, and device
memory may follow. So a page of each kind is offered to a scratch VM.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mtetool import procfs, uapi
from mtetool.vmm.mte_limits import Memory
from mtetool.vmm.scratch import ScratchVm, scratch_vm

# include/uapi/linux/magic.h
_FILE_SYSTEMS: dict[int, Memory | None] = {
    0x01021994: "shmem",  # tmpfs
    0x958458F6: "huge",  # hugetlbfs
    0x794C7630: None,  # overlayfs: what is below is not seen from here
}
_MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h; huge pages may all be in use

_libc = ctypes.CDLL(None, use_errno=True)


class ThisHost:
    """This host, as `mtetool.vmm.mte_limits` asks about it."""

    def __init__(self, create_vm: Callable[[], ScratchVm] = scratch_vm) -> None:
        self._create_vm = create_vm

    def accepts(self, memory: Memory) -> bool | None:
        """Return whether KVM accepts that memory, mapped shared, in a VM with MTE."""
        if memory == "file":
            return False
        try:
            with self._create_vm() as vm:
                if vm.enable(uapi.KVM_CAP_ARM_MTE) != 0:
                    return None
                return _OFFERS[memory](vm)
        except (OSError, ValueError):
            return None

    def memory_at(self, path: str) -> Memory | None:
        """Return what memory the file at that path is, or a new one there; None if unknown."""
        # QEMU makes a file in a directory, or at a path that does not exist.
        with suppress(OSError, ValueError):
            try:
                return _memory_at(path)
            except FileNotFoundError:
                return _memory_at(str(Path(path).parent))
        return None


def _memory_at(path: str) -> Memory | None:
    """Raises OSError, and ValueError for what no path can be."""
    mode = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return "file"  # such as /dev/dax0.0, whatever the file system that it is in
    return _FILE_SYSTEMS.get(_file_system(path), "file")


def _file_system(path: str) -> int:
    """The magic number of the file system: the first word of struct statfs."""
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        raise OSError(ctypes.get_errno(), "statfs")
    return buffer[0] & 0xFFFFFFFF


def _accepts_device(vm: ScratchVm) -> bool | None:
    """Offer the vDSO's data: like a device's memory, it is mapped without struct pages."""
    maps = procfs.mappings(os.getpid())
    vvar = next((each.start for each in maps if each.name == "[vvar]"), None)
    return None if vvar is None else _answer(vm.offer_memory(0, 0, mmap.PAGESIZE, vvar))


def _accepts_memfd(vm: ScratchVm, flags: int = 0) -> bool | None:
    fd = os.memfd_create("mtetool", flags | os.MFD_CLOEXEC)
    try:
        size = max(os.fstat(fd).st_blksize, mmap.PAGESIZE)
        os.ftruncate(fd, size)
        # Nothing is read or written there, so no page is allocated, and none has to be free.
        with mmap.mmap(fd, size, flags=mmap.MAP_SHARED | _MAP_NORESERVE) as memory:
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            return _answer(vm.offer_memory(0, 0, size, address))
    finally:
        os.close(fd)


def _accepts_huge(vm: ScratchVm) -> bool | None:
    return _accepts_memfd(vm, os.MFD_HUGETLB)


def _answer(result: int) -> bool | None:
    return {0: True, -errno.EINVAL: False}.get(result)


_OFFERS: dict[Memory, Callable[[ScratchVm], bool | None]] = {
    "device": _accepts_device,
    "huge": _accepts_huge,
    "shmem": _accepts_memfd,
}
