"""The helper thread: what it consists of in the process, how it starts, and how it ends.

It has no state of its own. If mtetool vanishes, it finishes its call, unmaps its memory and exits.
If a death leaves some of that memory behind, the next run recognises and removes it.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mtetool import procfs
from mtetool.attach import chain_room, memory, seccomp, signal_frame, steps
from mtetool.attach.borrow import BorrowedThread, run_call, state_letter
from mtetool.attach.ptrace import Registers, Tracee
from mtetool.attach.signal_frame import ALL_SIGNALS
from mtetool.errors import AttachRefusedError, BusyError
from mtetool.procfs import status_of

# System call numbers: include/uapi/asm-generic/unistd.h
_NR_IOCTL, _NR_EXIT, _NR_RT_SIGRETURN = 29, 93, 139
_NR_MUNMAP, _NR_CLONE, _NR_MMAP, _NR_MADVISE = 215, 220, 222, 233
_PROT_READ_WRITE = 0x3
_MAP_FLAGS = 0x2 | 0x20 | 0x4000 | 0x100000  # PRIVATE, ANONYMOUS, NORESERVE, FIXED_NOREPLACE
_MADV_DONTFORK = 10
# CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|SETTLS|PARENT_SETTID|CHILD_CLEARTID: what
# pthread_create passes. Sandboxes (QEMU's spawn=deny) let nothing else through, and the
# helper must not share the borrowed thread's TLS.
_CLONE_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x80000 | 0x100000 | 0x200000

# The map: a header page (the kernel writes and clears its first word: the helper's id while it
# lives), the helper's stack with its crash road, the argument page, the buffer. The address is one
# of a few that nothing else uses, so that the next run recognises what a killed run left: it is
# below 2^39, the smallest user address space that arm64 is built with for servers, and far from
# where the kernel puts mappings by itself.
_MAP_BASE = 0x6D_7465_0000
_MAP_STRIDE = 0x1000_0000
_MAP_PLACES = 16
_HEADER = struct.Struct("<II8s")
_MAGIC = b"mtetool\0"
_TLS_AT = 1024
PAGE_BYTES = mmap.PAGESIZE
"""The page size of this host, and so of every process on it."""
_STACK_BYTES = 64 << 10
_ARGUMENT_AT = PAGE_BYTES + _STACK_BYTES
_BUFFER_AT = _ARGUMENT_AT + PAGE_BYTES


def _whole_pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


_CHAIN_BYTES = _whole_pages(chain_room.ROOM_BYTES)

# In a frozen process, the thread ends when it can.
_LEAVE_PATIENCE_SECONDS = 10.0


class Helper:
    """The helper thread: traced, aimed at one call after another."""

    def __init__(self, thread: BorrowedThread, tracee: Tracee, base: int, length: int) -> None:
        self.pid = thread.pid
        self.tracee = tracee
        self.base = base
        self.length = length
        self._gadgets = thread.gadgets
        self._poe = thread.poe
        self._blank = Registers((0,) * 31, sp=_crash_road_at(base), pc=0, pstate=0)

    @property
    def argument_at(self) -> int:
        """The address of the page for an ioctl's argument."""
        return self.base + _ARGUMENT_AT

    @property
    def buffer_at(self) -> int:
        """The address of the transfer buffer."""
        return self.base + _BUFFER_AT

    @property
    def chain_at(self) -> int:
        """The address of the room for a chain of calls, the last in the map."""
        return self.base + self.length - _CHAIN_BYTES

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        """Make an ioctl(2); if we vanish, rt_sigreturn leads the thread onto its crash road."""
        self._aim(_NR_IOCTL, (fd, request, argument), home=self._gadgets.sigreturn)
        return run_call(self.tracee)[0]

    def frame(self, number: int, args: tuple[int, ...], blocked: int = ALL_SIGNALS) -> bytes:
        """A signal frame to make that call, and then to go on with the crash road."""
        gadgets = self._gadgets
        return signal_frame.build_calling(
            number,
            args,
            gadget=gadgets.svc_ret,
            home=gadgets.sigreturn,
            sp=self._blank.sp,
            poe=self._poe,
            blocked=blocked,
        )

    def aim_at_frame(self, address: int) -> None:
        """Point the thread at rt_sigreturn, with the signal frame at that address."""
        aimed = self._blank.with_call(_NR_RT_SIGRETURN)
        self.tracee.set_registers(replace(aimed, sp=address, pc=self._gadgets.sigreturn))

    def aim_at_its_end(self) -> bool:
        """Point the thread at its last call; return whether that removes its memory as well.

        Without the C library's way to end a thread, it only ends, which needs no memory.
        """
        steps.enter("leave")
        if self._gadgets.exit is None:
            self._aim(_NR_EXIT, (0,), home=self._gadgets.sigreturn)
            return False
        self._aim(_NR_MUNMAP, (self.base, self.length), home=self._gadgets.exit)
        return True

    def unmap_through(self, thread: BorrowedThread) -> None:
        """Unmap the memory through another thread, once this one is aimed at its end."""
        thread.syscall(_NR_MUNMAP, self.base, self.length)

    def leave(self) -> None:
        """Let the thread end, and wait until it has."""
        steps.enter("leave")
        self.tracee.detach()
        task = Path(f"/proc/{self.pid}/task/{self.tracee.tid}")
        deadline = time.monotonic() + _LEAVE_PATIENCE_SECONDS
        # In a process that is stopped as a whole, it ends when the process is continued.
        while state_letter(task) not in "XTt" and time.monotonic() < deadline:
            time.sleep(0.0005)

    def _aim(self, number: int, args: tuple[int, ...], *, home: int) -> None:
        self.tracee.set_registers(
            self._blank.calling(number, args, gadget=self._gadgets.svc_ret, home=home)
        )


def _crash_road_at(base: int) -> int:
    return (base + PAGE_BYTES + _STACK_BYTES - signal_frame.FRAME_BYTES) & ~15


def _second_road_at(base: int) -> int:
    return _crash_road_at(base) - (signal_frame.FRAME_BYTES + 15 & ~15)


def map_bytes(buffer_bytes: int) -> int:
    """The length of the helper's memory with a transfer buffer of that size: whole pages."""
    return _whole_pages(_BUFFER_AT + buffer_bytes) + _CHAIN_BYTES


def needed_calls(length: int, ioctls: tuple[tuple[int, int], ...]) -> tuple[seccomp.Call, ...]:
    """All calls made in the process, as a filter sees them; the addresses are typical ones."""
    everywhere = 0xFFFF_FFFF_FFFF_FFFF
    mapped = (_MAP_BASE, length, _PROT_READ_WRITE, _MAP_FLAGS, everywhere, 0)
    return (
        seccomp.Call("mmap", _NR_MMAP, mapped),
        seccomp.Call("madvise", _NR_MADVISE, (_MAP_BASE, length, _MADV_DONTFORK)),
        seccomp.Call("clone", _NR_CLONE, (_CLONE_FLAGS, *[_MAP_BASE] * 4)),
        *(ioctl_call(fd, request, _MAP_BASE + _ARGUMENT_AT) for fd, request in ioctls),
        seccomp.Call("munmap", _NR_MUNMAP, (_MAP_BASE, length)),
        seccomp.Call("exit", _NR_EXIT, (0,)),
        seccomp.Call("rt_sigreturn", _NR_RT_SIGRETURN),
    )


def ioctl_call(fd: int, request: int, argument: int) -> seccomp.Call:
    """An ioctl as a filter sees it."""
    return seccomp.Call(f"ioctl {request:#x}", _NR_IOCTL, (fd, request, argument))


def start_helper(thread: BorrowedThread, length: int) -> Helper:
    """Map the buffer, lay the helper's crash road, and only then start the helper.

    `length` comes from `map_bytes`. Raises AttachRefusedError where the process has no room for
    the memory or the thread; then nothing is left behind.
    """
    steps.enter("helper")
    base = _map(thread, length)
    try:
        thread.syscall(_NR_MADVISE, base, length, _MADV_DONTFORK)
        memory.write(thread.pid, base, _HEADER.pack(0, os.getpid(), _MAGIC))
        _lay_helper_road(thread, base, length)
        road = _crash_road_at(base)
        result, tracee = thread.clone(_NR_CLONE, _CLONE_FLAGS, road, base, base + _TLS_AT, base)
        if result < 0:
            raise AttachRefusedError(
                f"process {thread.pid} could not start a thread: {os.strerror(-result)}",
                hint="raise its limit on threads (the pids cgroup, RLIMIT_NPROC)",
            )
        if tracee is None:
            # It is on its crash road by now, which removes its memory.
            raise BusyError(f"a thread that process {thread.pid} made for mtetool is not traced")
    except AttachRefusedError:
        thread.syscall(_NR_MUNMAP, base, length)
        raise
    tracee.wait()
    return Helper(thread, tracee, base, length)


def _lay_helper_road(thread: BorrowedThread, base: int, length: int) -> None:
    gadgets = thread.gadgets
    if gadgets.exit is not None:
        first = signal_frame.build_calling(
            _NR_MUNMAP, (base, length), gadget=gadgets.svc_ret, home=gadgets.exit, poe=thread.poe
        )
    else:
        # No exit to return to: unmap only the part without the frames, then a second frame's call
        # ends the thread. The next run removes the rest.
        buffer_at = base + _BUFFER_AT
        first = signal_frame.build_calling(
            _NR_MUNMAP,
            (buffer_at, base + length - buffer_at),
            gadget=gadgets.svc_ret,
            home=gadgets.sigreturn,
            sp=_second_road_at(base),
            poe=thread.poe,
        )
        second = signal_frame.build_calling(
            _NR_EXIT, (0,), gadget=gadgets.svc_ret, home=gadgets.sigreturn, poe=thread.poe
        )
        memory.write(thread.pid, _second_road_at(base), second)
    memory.write(thread.pid, _crash_road_at(base), first)


def _map(thread: BorrowedThread, length: int) -> int:
    result = -errno.ENOMEM
    for place in range(_MAP_PLACES):
        address = _MAP_BASE + place * _MAP_STRIDE
        result = thread.syscall(
            _NR_MMAP, address, length, _PROT_READ_WRITE, _MAP_FLAGS, 0xFFFF_FFFF_FFFF_FFFF, 0
        )
        if result == address:
            return result
        if result != -errno.EEXIST:
            break
    raise AttachRefusedError(
        f"process {thread.pid} could not map {length} bytes: {os.strerror(abs(result))}",
        hint="raise its memory limits (RLIMIT_AS, RLIMIT_MEMLOCK, the memory cgroup)",
    )


def remove_leftovers(thread: BorrowedThread, length: int) -> None:
    """Unmap memory that a killed run left: at our addresses, anonymous, its helper not alive.

    Nothing is touched while another run works in the process: it may be between its mmap and its
    clone, where its memory looks like a leftover. The check for one comes after the look at the
    mappings: a run that had mapped its memory by then, and is alive, traces a thread now.
    """
    steps.enter("leftovers")
    mappings = procfs.mappings(thread.pid)
    if _others_traced(thread.pid, thread.tid):
        return
    for mapping in mappings:
        place, off = divmod(mapping.start - _MAP_BASE, _MAP_STRIDE)
        anonymous = mapping.inode == 0 and not mapping.name and mapping.flags == "rw-p"
        if off or not 0 <= place < _MAP_PLACES or not anonymous:
            continue
        helper, _, magic = _HEADER.unpack(memory.read(thread.pid, mapping.start, _HEADER.size))
        alive = helper != 0 and _lives(thread.pid, helper)
        # A run that died right after its mmap left no header: then the length must be ours.
        nameless = magic == bytes(8) and mapping.end - mapping.start == length
        if (magic == _MAGIC or nameless) and not alive:
            thread.syscall(_NR_MUNMAP, mapping.start, mapping.end - mapping.start)


def _lives(pid: int, tid: int) -> bool:
    """Whether the process has a thread that its own PID namespace calls `tid`."""
    return any(int(status.get("NSpid", "0").split()[-1]) == tid for status in _statuses(pid))


def _others_traced(pid: int, but: int) -> bool:
    return any(
        int(status["Pid"]) != but and status["TracerPid"] != "0" for status in _statuses(pid)
    )


def _statuses(pid: int) -> Iterator[dict[str, str]]:
    """What /proc says about each thread: TracerPid, NSpid and so on."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if status := status_of(f"{pid}/task/{task.name}"):
            yield status
