"""The real side: this process, and the kernel that it runs on."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import tempfile
import time
import zlib
from array import array
from typing import Literal

from mtetool import uapi
from tests.differential.sides import (
    ARENA,
    ARENA_PAGES,
    HUGE_ARENA,
    HUGE_PAGES,
    Kind,
    Protection,
    Trace,
    pattern,
)

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FIXED_NOREPLACE = 0x100000
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_MADV_DONTNEED = 4
_MADV_PAGEOUT = 21
_PAGE_OUT_TRIES = 500
_PAGE_OUT_SECONDS = 0.01
_SWAP_ON = """
fallocate -l 4M /root/differential.swap
chmod 600 /root/differential.swap
mkswap /root/differential.swap >/dev/null
swapon /root/differential.swap
"""
_SWAP_OFF = "swapoff /root/differential.swap; rm /root/differential.swap"
_PUNCH_AND_KEEP_SIZE = 3
_PROT_MTE = 0x20
_PROTECTIONS = {
    "none": 0,
    "r": mmap.PROT_READ,
    "rw": mmap.PROT_READ | mmap.PROT_WRITE,
    "rw-mte": mmap.PROT_READ | mmap.PROT_WRITE | _PROT_MTE,
}
_PTRACE_TRACEME = 0
_TRACES = {"peek": 33, "poke": 34}  # PTRACE_PEEKMTETAGS, PTRACE_POKEMTETAGS
# The smallest huge pages of a kernel, by its page size.
_HUGE_PAGES = {4096: 64 << 10, 16384: 2 << 20}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_ssize_t
for _name in ("process_vm_readv", "process_vm_writev", "ptrace"):
    getattr(_libc, _name).restype = ctypes.c_ssize_t


def _ulong(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value & (1 << 64) - 1)


class RealSide:
    """This process on its own kernel; a `Side`. Raises OSError if there is no KVM.

    `scrub` sets the tags of the kernel's free huge pages to 0 before they are mapped.
    """

    def __init__(self, *, scrub: bool = True) -> None:
        self._scrubs = scrub
        self._swaps = False
        self.page_size_bytes = mmap.PAGESIZE
        self._kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self._vms: dict[int, int] = {}
        self._vcpus: dict[tuple[int, int], int] = {}
        self._files: dict[int, int] = {}
        self.hugepage_bytes = _reserve_huge_pages(_HUGE_PAGES[self.page_size_bytes])
        self._reserve(_MAP_FIXED_NOREPLACE)

    def reset(self) -> int:
        """Close everything and map the arenas again."""
        for vm in list(self._vms):
            self.close_vm(vm)
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._reserve(_MAP_FIXED)
        return 0

    def close(self) -> None:
        """Release everything, the arenas too."""
        self.reset()
        self.unmap(ARENA, ARENA_PAGES * self.page_size_bytes)
        os.close(self._kvm)
        if self._swaps:
            subprocess.run(["sh", "-ec", _SWAP_OFF], check=True)

    def _reserve(self, fixed: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | fixed
        size = ARENA_PAGES * self.page_size_bytes
        answer = self._mmap(ARENA, size, 0, flags, -1, 0)
        assert answer == 0, f"the arena cannot be mapped: {answer}"
        if self.hugepage_bytes:
            self.unmap(HUGE_ARENA, HUGE_PAGES * self.hugepage_bytes)

    # --- KVM --------------------------------------------------------------------------

    def create_vm(self, vm: int, kind: int) -> int:
        """See `Side.create_vm`."""
        answer = _ioctl(self._kvm, uapi.KVM_CREATE_VM, kind)
        if answer < 0:
            return answer
        self._vms[vm] = answer
        return 0

    def close_vm(self, vm: int) -> int:
        """See `Side.close_vm`."""
        if vm not in self._vms:
            return -errno.EBADF
        for key in [key for key in self._vcpus if key[0] == vm]:
            os.close(self._vcpus.pop(key))
        os.close(self._vms.pop(vm))
        return 0

    def check_extension(self, vm: int, capability: int) -> int:
        """See `Side.check_extension`."""
        return _ioctl(self._vms.get(vm, -1), uapi.KVM_CHECK_EXTENSION, capability)

    def enable_cap(self, vm: int, capability: int, flags: int, argument: int) -> int:
        """See `Side.enable_cap`."""
        request = uapi.KVM_ENABLE_CAP_STRUCT.pack(capability, flags, argument, 0, 0, 0)
        return _ioctl(self._vms.get(vm, -1), uapi.KVM_ENABLE_CAP, request)

    def create_guest_memfd(self, vm: int, file: int, size_bytes: int) -> int:
        """See `Side.create_guest_memfd`."""
        request = uapi.KVM_CREATE_GUEST_MEMFD_STRUCT.pack(size_bytes, uapi.GUEST_MEMFD_FLAG_MMAP)
        answer = _ioctl(self._vms.get(vm, -1), uapi.KVM_CREATE_GUEST_MEMFD, request)
        if answer < 0:
            return answer
        self._files[file] = answer
        return 0

    def set_guest_memfd_slot(
        self, vm: int, slot: int, ipa: int, size_bytes: int, address: int, file: int
    ) -> int:
        """See `Side.set_guest_memfd_slot`."""
        words = (slot, uapi.KVM_MEM_GUEST_MEMFD, ipa, size_bytes, address, 0, self._files[file])
        region = uapi.KVM_MEMORY_REGION2_STRUCT.pack(*words)
        return _ioctl(self._vms.get(vm, -1), uapi.KVM_SET_USER_MEMORY_REGION2, region)

    def create_vcpu(self, vm: int, number: int) -> int:
        """See `Side.create_vcpu`."""
        answer = _ioctl(self._vms.get(vm, -1), uapi.KVM_CREATE_VCPU, number)
        if answer < 0:
            return answer
        self._vcpus[vm, number] = answer
        return 0

    def init_vcpu(self, vm: int, number: int, target: int, features: int) -> int:
        """See `Side.init_vcpu`."""
        fd = self._vcpus.get((vm, number), -1)
        return _ioctl(fd, uapi.KVM_ARM_VCPU_INIT, uapi.vcpu_init(target, features))

    def set_memslot(
        self, vm: int, slot: int, flags: int, ipa: int, size_bytes: int, address: int
    ) -> int:
        """See `Side.set_memslot`."""
        region = uapi.memory_region(slot, flags, ipa, size_bytes, address)
        return _ioctl(self._vms.get(vm, -1), uapi.KVM_SET_USER_MEMORY_REGION, region)

    def copy_tags(
        self, vm: int, ipa: int, length: int, address: int, flags: int, reserved: list[int]
    ) -> int:
        """See `Side.copy_tags`."""
        request = uapi.KVM_ARM_COPY_MTE_TAGS_STRUCT.pack(ipa, length, address, flags, *reserved)
        return _ioctl(self._vms.get(vm, -1), uapi.KVM_ARM_MTE_COPY_TAGS, request)

    def copy_tags_at(self, vm: int, address: int) -> int:
        """See `Side.copy_tags_at`."""
        return _ioctl(self._vms.get(vm, -1), uapi.KVM_ARM_MTE_COPY_TAGS, address)

    def copy_tags_in_child(self, vm: int, ipa: int, length: int, address: int, flags: int) -> int:
        """See `Side.copy_tags_in_child`."""
        child = os.fork()
        if not child:
            answer = self.copy_tags(vm, ipa, length, address, flags, [0, 0])
            os._exit(-answer if answer < 0 else 255)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return -status if status != 255 else 0

    # --- memory -----------------------------------------------------------------------

    def create_file(self, file: int, kind: Literal["memory", "disk"], size_bytes: int) -> int:
        """See `Side.create_file`."""
        if kind == "memory":
            fd = os.memfd_create("differential")
        else:
            # The root disk: /tmp may be memory.
            fd, name = tempfile.mkstemp(dir="/root")
            os.unlink(name)  # noqa: PTH108
        os.ftruncate(fd, size_bytes)
        self._files[file] = fd
        return 0

    def truncate(self, file: int, size_bytes: int) -> int:
        """See `Side.truncate`."""
        return _answer(_libc.ftruncate(self._files.get(file, -1), _ulong(size_bytes)))

    def punch(self, file: int, offset: int, size_bytes: int) -> int:
        """See `Side.punch`."""
        fd = self._files.get(file, -1)
        answer = _libc.fallocate(fd, _PUNCH_AND_KEEP_SIZE, _ulong(offset), _ulong(size_bytes))
        return _answer(answer)

    def map(
        self, address: int, size_bytes: int, kind: Kind, protection: Protection, file: int, at: int
    ) -> int:
        """See `Side.map`."""
        private = kind in ("private", "file-private", "disk-private", "huge")
        flags = (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED) | _MAP_FIXED
        fd = -1
        if kind in ("private", "shared", "huge"):
            flags |= mmap.MAP_ANONYMOUS
        else:
            fd = self._files.get(file, -1)
        if kind == "huge":
            flags |= _MAP_HUGETLB | (self.hugepage_bytes.bit_length() - 1) << _MAP_HUGE_SHIFT
            if self._scrubs:
                self._scrub(address, size_bytes, flags)
            flags |= mmap.MAP_POPULATE
        return self._mmap(address, size_bytes, _PROTECTIONS[protection], flags, fd, at)

    def _scrub(self, address: int, size_bytes: int, flags: int) -> None:
        """Set the tags of the huge pages that are next in the kernel's pool to 0.

        The kernel clears their memory, but not their tags: once a page of tags is written to one,
        the rest of it shows those of its last user.
        """
        if self._mmap(address, size_bytes, 3, flags | mmap.MAP_POPULATE, -1, 0):
            return
        vm, buffer = -1, ctypes.create_string_buffer(size_bytes // 16)
        assert self.create_vm(vm, 0) == 0
        # In this order, older kernels allow it, too.
        assert self.set_memslot(vm, 0, 0, 0, size_bytes, address) == 0
        assert self.enable_cap(vm, uapi.KVM_CAP_ARM_MTE, 0, 0) == 0
        at = ctypes.addressof(buffer)
        assert self.copy_tags(vm, 0, size_bytes, at, uapi.KVM_ARM_TAGS_TO_GUEST, [0, 0])
        self.close_vm(vm)
        self.unmap(address, size_bytes)

    def _mmap(
        self, address: int, size_bytes: int, protection: int, flags: int, fd: int, at: int
    ) -> int:
        words = (_ulong(address), _ulong(size_bytes), protection, flags, fd, _ulong(at))
        answer = _libc.mmap(*words)
        return 0 if answer == address else _answer(answer)

    def unmap(self, address: int, size_bytes: int) -> int:
        """See `Side.unmap`."""
        return _answer(_libc.munmap(_ulong(address), _ulong(size_bytes)))

    def protect(self, address: int, size_bytes: int, protection: Protection) -> int:
        """See `Side.protect`."""
        words = (_ulong(address), _ulong(size_bytes), _PROTECTIONS[protection])
        return _answer(_libc.mprotect(*words))

    def discard(self, address: int, size_bytes: int) -> int:
        """See `Side.discard`."""
        return _answer(_libc.madvise(_ulong(address), _ulong(size_bytes), _MADV_DONTNEED))

    def page_out(self, address: int, size_bytes: int) -> int:
        """See `Side.page_out`."""
        if not self._swaps:
            subprocess.run(["sh", "-ec", _SWAP_ON], check=True)
            self._swaps = True
        for _ in range(_PAGE_OUT_TRIES):
            answer = _libc.madvise(_ulong(address), _ulong(size_bytes), _MADV_PAGEOUT)
            present, swapped = self._whereabouts(address, size_bytes)
            if answer or not present:
                break
            # A page that another CPU has just added goes once that CPU has put it on the LRU list.
            time.sleep(_PAGE_OUT_SECONDS)
        return _answer(answer) or swapped

    def _whereabouts(self, address: int, size_bytes: int) -> tuple[int, int]:
        """Return how many pages the page tables have in memory, and on swap."""
        entries = array("Q")
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123
            pagemap.seek(address // self.page_size_bytes * 8)
            entries.frombytes(pagemap.read(size_bytes // self.page_size_bytes * 8))
        return sum(e >> 63 for e in entries), sum(e >> 62 & 1 for e in entries)

    def trace_tags(self, request: Trace, address: int, buffer: int, n_tags: int) -> int:
        """See `Side.trace_tags`."""
        child = os.fork()
        if not child:
            _libc.ptrace(_PTRACE_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(child, 0)
        vector = (ctypes.c_ulong * 2)(buffer, n_tags)
        result = _answer(_libc.ptrace(_TRACES[request], child, _ulong(address), vector))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert result == 0 or vector[1] == n_tags, "iov_len was changed"
        return result or vector[1]

    def fill(self, address: int, size_bytes: int, seed: int) -> int:
        """See `Side.fill`."""
        data = ctypes.create_string_buffer(pattern(size_bytes, seed), size_bytes)
        return self._transfer(_libc.process_vm_writev, data, address, size_bytes)

    def peek(self, address: int, size_bytes: int) -> int:
        """See `Side.peek`."""
        data = self.contents(address, size_bytes)
        return zlib.crc32(data) if len(data) == size_bytes else -errno.EFAULT

    def contents(self, address: int, size_bytes: int) -> bytes:
        """See `Side.contents`."""
        data = ctypes.create_string_buffer(size_bytes)
        n_bytes = self._transfer(_libc.process_vm_readv, data, address, size_bytes)
        return data.raw[: max(n_bytes, 0)]

    @staticmethod
    def _transfer(
        call: ctypes._NamedFuncPointer, data: ctypes.Array[ctypes.c_char], at: int, n: int
    ) -> int:
        # By a system call, which fails where a direct access would end the process.
        own = (ctypes.c_ulong * 2)(ctypes.addressof(data), n)
        other = (ctypes.c_ulong * 2)(at, n)
        one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
        return _answer(call(os.getpid(), own, one, other, one, none))


def _answer(result: int) -> int:
    return result if result >= 0 else -ctypes.get_errno()


def _ioctl(fd: int, request: int, argument: int | bytes) -> int:
    if fd < 0:
        return -errno.EBADF
    # The C library's ioctl passes on any number as an address.
    passed = argument if isinstance(argument, bytes) else _ulong(argument)
    return _answer(_libc.ioctl(fd, ctypes.c_ulong(request), passed))


def _reserve_huge_pages(size_bytes: int) -> int:
    """Ask the kernel for huge pages of a size; return the size, or 0 if it has none."""
    path = f"/sys/kernel/mm/hugepages/hugepages-{size_bytes >> 10}kB/nr_hugepages"
    try:
        with open(path, "r+") as pool:  # noqa: PTH123
            pool.write(str(HUGE_PAGES))
            pool.flush()
            pool.seek(0)
            return size_bytes if int(pool.read()) >= HUGE_PAGES else 0
    except OSError:
        return 0
