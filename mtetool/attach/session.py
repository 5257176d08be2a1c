"""A helper thread inside the process that makes ioctls for us while its own threads run on.

A thread of the process is borrowed for a moment, to map a transfer buffer and to start the
helper; it goes home before the first ioctl, so that the process's main loop answers during
a long copy. The helper has no state of its own. If mtetool vanishes, it finishes its call,
unmaps the buffer and exits.

One OS thread of ours (the tracer) owns all tracing: ptrace belongs to the thread that
attached. Whatever the rest of mtetool does meanwhile, a process that ends is noticed and
reaped by it within a moment.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mtetool.attach import frame, memory, seccomp, steps
from mtetool.attach.borrow import BorrowedThread, run_call, state_letter
from mtetool.attach.gadgets import Gadgets
from mtetool.attach.permission import refusal, status_of
from mtetool.attach.ptrace import Registers, Tracee
from mtetool.errors import (
    AttachRefusedError,
    BusyError,
    GuestError,
    GuestLostError,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

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

# The map: a header page (its first word is written and cleared by the kernel: the helper's
# id while it lives), the helper's stack with its crash road, the argument page, the buffer.
# The address is one of a few that nothing else uses, so that the next run recognises what
# a killed one left: it is below 2^39, the smallest user address space arm64 is built with
# for servers, and far from where the kernel puts mappings by itself.
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

# What takes longer is stuck: mtetool then ends, which is safe; hanging is not. A call of the
# helper may be held up by memory that is read in from swap.
_PATIENCE_SECONDS = 60.0
_ATTACH_PATIENCE_SECONDS = 20.0
_LEAVE_PATIENCE_SECONDS = 10.0
_IDLE_SECONDS = 0.1
# How many threads are tried where one after the other cannot be borrowed safely.
_MOST_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Target:
    """The process to attach to, and what is known of it above.

    `ioctls` are the (fd, request) pairs that will be made, for the seccomp filter to be asked.
    `candidates` gives the threads that may be borrowed, the best first; `check` raises where
    the process is not the one that was meant (a PID may change hands).
    """

    pid: int
    ioctls: tuple[tuple[int, int], ...]
    candidates: Callable[[], Sequence[int]]
    check: Callable[[], object]


class Session:
    """Calls inside the process through a helper thread, until `close`.

    `buffer_bytes` is the size of the transfer buffer. Usable from any thread of ours, one call
    at a time. Raises GuestError subclasses where the process cannot be borrowed from; nothing
    was touched then.
    """

    def __init__(self, target: Target, *, buffer_bytes: int) -> None:
        self.pid = target.pid
        self.buffer_bytes = buffer_bytes
        self.borrowed_seconds = 0.0
        self._target = target
        self._helper: _Helper | None = None
        self._held: dict[int, Tracee] = {}
        self._filters: tuple[seccomp.Program, ...] = ()
        self._lost: GuestLostError | None = None
        self._stuck = False
        self._requests: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None]
        self._requests = queue.SimpleQueue()
        self._tracer = threading.Thread(target=self._trace, name="tracer", daemon=True)
        self._tracer.start()
        try:
            self._call(self._attach, _ATTACH_PATIENCE_SECONDS)
        except BaseException:
            # A signal of ours may come while the tracer is still at it.
            self.close()
            raise

    def ioctl(self, fd: int, request: int, argument: bytes | int) -> int:
        """ioctl(2) in the process, on its file descriptor; the result, -errno for an error.

        An argument in bytes is copied there first. Raises GuestLostError, and AttachRefusedError
        where the process's seccomp filter does not allow it.
        """
        return self._call(lambda: self._ioctl(fd, request, argument))

    @property
    def buffer_address(self) -> int:
        """Where the transfer buffer is in the process."""
        return self._alive().base + _BUFFER_AT

    def read_buffer(self, out: NDArray[np.uint8]) -> None:
        """Copy the transfer buffer's first bytes into `out`. Raises GuestLostError."""
        self._copy(memory.read_into, out)

    def write_buffer(self, data: NDArray[np.uint8]) -> None:
        """Copy `data` to the start of the transfer buffer. Raises GuestLostError."""
        self._copy(memory.write_from, data)

    @property
    def helper_tid(self) -> int:
        """The helper thread's id."""
        return self._alive().tracee.tid

    def hold(self, tids: Iterable[int]) -> dict[int, Registers]:
        """Stop threads and hold them; their registers. One that ended is left out.

        Held they are by ptrace alone: whatever becomes of us, they run on. Signals to them wait.
        Raises GuestLostError.
        """
        return self._call(lambda: self._hold(tids))

    def release(self, tids: Iterable[int] | None = None) -> None:
        """Let held threads run on: these, or all. Raises GuestLostError."""
        self._call(lambda: self._release(tids))

    def close(self) -> None:
        """Let the helper end and take its memory along; nothing of ours stays. Idempotent."""
        if self._stuck or not self._tracer.is_alive():
            return
        try:
            self._call(self._let_go)
        finally:
            self._requests.put(None)
            self._tracer.join(_PATIENCE_SECONDS)

    # --- on the caller's side ---------------------------------------------------------

    def _call(self, function: Callable[[], T], patience: float = _PATIENCE_SECONDS) -> T:
        if self._stuck:
            raise self._no_answer(patience)
        future: Future[object] = Future()
        self._requests.put((future, function))
        try:
            return future.result(patience)  # type: ignore[return-value]
        except TimeoutError:
            self._stuck = True
            raise self._no_answer(patience) from None

    def _no_answer(self, patience: float) -> BusyError:
        return BusyError(
            f"process {self.pid} did not answer for {patience:.0f} seconds",
            hint="it is frozen (a cgroup's freezer?) or stuck in the kernel; mtetool lets go of it"
            " by ending, and it goes on when it can",
            pid=self.pid,
        )

    def _alive(self) -> _Helper:
        if self._lost is not None:
            raise self._lost
        if self._helper is None:
            raise GuestLostError(f"process {self.pid} is not attached to")
        return self._helper

    def _copy(
        self, copy: Callable[[int, int, NDArray[np.uint8]], None], data: NDArray[np.uint8]
    ) -> None:
        address = self.buffer_address
        steps.enter("call")
        try:
            copy(self.pid, address, data)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EFAULT):
                raise self._gone() from error
            raise

    def _gone(self) -> GuestLostError:
        return GuestLostError(
            f"process {self.pid} ended while mtetool was attached to it",
            hint="look at why the VMM ended; mtetool does not end it",
        )

    # --- on the tracer's side -----------------------------------------------------------

    def _trace(self) -> None:
        while True:
            try:
                request = self._requests.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._reap()
                continue
            if request is None:
                return
            future, function = request
            try:
                future.set_result(function())
            except GuestLostError as error:
                self._lost = error
                future.set_exception(error)
            except ProcessLookupError:
                self._lost = self._gone()
                future.set_exception(self._lost)
            except BaseException as error:  # noqa: BLE001 - it is raised on the caller's side
                future.set_exception(error)

    def _reap(self) -> None:
        # Also when it is known to be lost: unreaped, a thread keeps the process a zombie.
        if self._helper is not None and self._helper.tracee.ended() and self._lost is None:
            self._lost = self._gone()

    def _attach(self) -> None:
        try:
            with _alone(self.pid), ExitStack() as stack:
                thread = self._borrow(stack)
                _remove_leftovers(thread, _map_bytes(self.buffer_bytes))
                self._helper = _start_helper(thread, _map_bytes(self.buffer_bytes))
        except OSError as error:
            raise refusal(self.pid, error) from error
        self.borrowed_seconds = thread.seconds
        self._filters = thread.filters

    def _borrow(self, stack: ExitStack, but: int = 0) -> BorrowedThread:
        """The first thread (`but` one) that can be borrowed safely, until the stack unwinds."""
        first: AttachRefusedError | None = None
        calls = _needed_calls(_map_bytes(self.buffer_bytes), self._target.ioctls)
        candidates = [tid for tid in self._target.candidates() if tid != but]
        for tid in candidates[:_MOST_CANDIDATES]:
            thread = BorrowedThread(self.pid, tid, calls, self._target.check)
            try:
                return stack.enter_context(thread)
            except AttachRefusedError as error:
                first = first or error
            except ProcessLookupError:
                continue  # that thread ended meanwhile
        if first is not None:
            raise first
        raise AttachRefusedError(
            f"process {self.pid} has no thread that could be borrowed", hint="try again"
        )

    def _ioctl(self, fd: int, request: int, argument: bytes | int) -> int:
        helper = self._alive()
        steps.enter("call")
        at = argument if isinstance(argument, int) else helper.base + _ARGUMENT_AT
        seccomp.allow(self._filters, self.pid, _ioctl_call(fd, request, at))
        try:
            if isinstance(argument, bytes):
                memory.write(self.pid, at, argument)
            return helper.syscall(_NR_IOCTL, fd, request, at)
        except OSError as error:
            # An error of ours on the way is no answer of the ioctl.
            raise self._gone() from error

    def _hold(self, tids: Iterable[int]) -> dict[int, Registers]:
        self._alive()
        steps.enter("freeze")
        seized: list[Tracee] = []
        for tid in sorted(set(tids) - set(self._held)):
            try:
                tracee = self._held[tid] = Tracee.seize(tid)
                tracee.interrupt()
                seized.append(tracee)
            except ProcessLookupError:
                self._held.pop(tid, None)
            except OSError as error:
                raise refusal(self.pid, error) from error
        # All have been asked to stop before the first is waited for.
        registers = {}
        for tracee in seized:
            try:
                tracee.until_event_stop()
                registers[tracee.tid] = tracee.registers()
            except (GuestLostError, ProcessLookupError):
                del self._held[tracee.tid]
        return registers

    def _release(self, tids: Iterable[int] | None) -> None:
        steps.enter("thaw")
        for tid in list(self._held) if tids is None else tids:
            if (tracee := self._held.pop(tid, None)) is not None:
                with suppress(ProcessLookupError):
                    tracee.detach()

    def _let_go(self) -> None:
        self._release(None)
        helper, self._helper = self._helper, None
        if helper is None or self._lost is not None:
            return
        # A process that ended took everything along; what stays, the next run removes.
        with suppress(OSError, GuestError):
            try:
                if not helper.aim_at_its_end():
                    with _alone(self.pid), ExitStack() as stack:
                        thread = self._borrow(stack, but=helper.tracee.tid)
                        thread.syscall(_NR_MUNMAP, helper.base, helper.length)
            finally:
                helper.leave()


@contextmanager
def _alone(pid: int) -> Iterator[None]:
    """No other mtetool maps or unmaps memory in the process meanwhile. Raises BusyError.

    The lock is on the process's own file in /proc, so that the death of its holder frees it.
    Where another mount of /proc hides two runs from each other, the marks in the memory itself
    (`_remove_leftovers`) have to do.
    """
    file = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _ATTACH_PATIENCE_SECONDS / 2
        while not _locked(file):
            if time.monotonic() > deadline:
                raise BusyError(
                    f"another mtetool is attaching to process {pid} and does not get on",
                    hint="see what it waits for; ending it is safe",
                    pid=pid,
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(file)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Helper:
    """The helper thread: traced, aimed at one call after the other."""

    def __init__(self, pid: int, tracee: Tracee, base: int, length: int, gadgets: Gadgets) -> None:
        self.pid = pid
        self.tracee = tracee
        self.base = base
        self.length = length
        self._gadgets = gadgets
        self._blank = Registers((0,) * 31, sp=_crash_road_at(base), pc=0, pstate=0)

    def syscall(self, number: int, *args: int) -> int:
        """A call; if we vanish, rt_sigreturn leads the thread onto its crash road."""
        self._aim(number, args, home=self._gadgets.sigreturn)
        return run_call(self.tracee)[0]

    def aim_at_its_end(self) -> bool:
        """Point the thread at what it does last. Whether that takes its memory along.

        Without the C library's way to end a thread, it only ends, for which it needs no memory.
        """
        steps.enter("leave")
        if self._gadgets.exit is None:
            self._aim(_NR_EXIT, (0,), home=self._gadgets.sigreturn)
            return False
        self._aim(_NR_MUNMAP, (self.base, self.length), home=self._gadgets.exit)
        return True

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
    return (base + PAGE_BYTES + _STACK_BYTES - frame.FRAME_BYTES) & ~15


def _second_road_at(base: int) -> int:
    return _crash_road_at(base) - (frame.FRAME_BYTES + 15 & ~15)


def _map_bytes(buffer_bytes: int) -> int:
    return (_BUFFER_AT + buffer_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def _needed_calls(length: int, ioctls: tuple[tuple[int, int], ...]) -> tuple[seccomp.Call, ...]:
    """All calls that are made in the process, as a filter sees them; addresses are like ours."""
    everywhere = 0xFFFF_FFFF_FFFF_FFFF
    mapped = (_MAP_BASE, length, _PROT_READ_WRITE, _MAP_FLAGS, everywhere, 0)
    return (
        seccomp.Call("mmap", _NR_MMAP, mapped),
        seccomp.Call("madvise", _NR_MADVISE, (_MAP_BASE, length, _MADV_DONTFORK)),
        seccomp.Call("clone", _NR_CLONE, (_CLONE_FLAGS, *[_MAP_BASE] * 4)),
        *(_ioctl_call(fd, request, _MAP_BASE + _ARGUMENT_AT) for fd, request in ioctls),
        seccomp.Call("munmap", _NR_MUNMAP, (_MAP_BASE, length)),
        seccomp.Call("exit", _NR_EXIT, (0,)),
        seccomp.Call("rt_sigreturn", _NR_RT_SIGRETURN),
    )


def _ioctl_call(fd: int, request: int, argument: int) -> seccomp.Call:
    return seccomp.Call(f"ioctl {request:#x}", _NR_IOCTL, (fd, request, argument))


def _start_helper(thread: BorrowedThread, length: int) -> _Helper:
    """Map the buffer, lay the helper's crash road, and only then make the helper."""
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
                hint="raise its limit of threads (the pids cgroup, RLIMIT_NPROC)",
            )
        if tracee is None:
            # It is on its crash road by now, which takes its memory along.
            raise BusyError(f"a thread that process {thread.pid} made for mtetool was not traced")
    except AttachRefusedError:
        thread.syscall(_NR_MUNMAP, base, length)
        raise
    tracee.wait()
    return _Helper(thread.pid, tracee, base, length, thread.gadgets)


def _lay_helper_road(thread: BorrowedThread, base: int, length: int) -> None:
    gadgets = thread.gadgets
    if gadgets.exit is not None:
        first = frame.build_calling(
            _NR_MUNMAP, (base, length), gadget=gadgets.svc_ret, home=gadgets.exit, poe=thread.poe
        )
    else:
        # No exit to return to: unmap only what does not carry the frames, then a second
        # frame's call ends the thread. What stays is removed by the next run.
        buffer_at = base + _BUFFER_AT
        first = frame.build_calling(
            _NR_MUNMAP,
            (buffer_at, base + length - buffer_at),
            gadget=gadgets.svc_ret,
            home=gadgets.sigreturn,
            sp=_second_road_at(base),
            poe=thread.poe,
        )
        second = frame.build_calling(
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
        hint="its memory limits leave no room (RLIMIT_AS, RLIMIT_MEMLOCK, the memory cgroup)",
    )


def _remove_leftovers(thread: BorrowedThread, length: int) -> None:
    """Unmap what a killed run left: at our addresses, anonymous, its helper not alive.

    Nothing is touched while another run is at work in the process: it may be between its mmap
    and its clone, where its memory looks like a leftover. That is asked after the look at the
    memory: a run that had mapped it then, and is alive, traces a thread now.
    """
    steps.enter("leftovers")
    mappings = memory.mappings(thread.pid)
    if _others_traced(thread.pid, thread.tid):
        return
    for mapping in mappings:
        place, off = divmod(mapping.start - _MAP_BASE, _MAP_STRIDE)
        anonymous = mapping.inode == 0 and not mapping.name and mapping.flags == "rw-p"
        if off or not 0 <= place < _MAP_PLACES or not anonymous:
            continue
        helper, _, magic = _HEADER.unpack(memory.read(thread.pid, mapping.start, _HEADER.size))
        alive = helper != 0 and _lives(thread.pid, helper)
        # One that died right behind its mmap has no header yet: then the length must be ours.
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
    """What /proc says of each thread: TracerPid, NSpid and so on."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if status := status_of(f"{pid}/task/{task.name}"):
            yield status
