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
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mtetool.attach import memory, seccomp, steps
from mtetool.attach.borrow import BorrowedThread
from mtetool.attach.helper import (
    Helper,
    ioctl_call,
    map_bytes,
    needed_calls,
    remove_leftovers,
    start_helper,
)
from mtetool.attach.permission import refusal
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

# What takes longer is stuck: mtetool then ends, which is safe; hanging is not. A call of the
# helper may be held up by memory that is read in from swap.
_PATIENCE_SECONDS = 60.0
_ATTACH_PATIENCE_SECONDS = 20.0
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
        self._helper: Helper | None = None
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
        return self._alive().buffer_at

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

    def _alive(self) -> Helper:
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
                remove_leftovers(thread, map_bytes(self.buffer_bytes))
                self._helper = start_helper(thread, map_bytes(self.buffer_bytes))
        except OSError as error:
            raise refusal(self.pid, error) from error
        self.borrowed_seconds = thread.seconds
        self._filters = thread.filters

    def _borrow(self, stack: ExitStack, but: int = 0) -> BorrowedThread:
        """The first thread (`but` one) that can be borrowed safely, until the stack unwinds."""
        first: AttachRefusedError | None = None
        calls = needed_calls(map_bytes(self.buffer_bytes), self._target.ioctls)
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
        at = argument if isinstance(argument, int) else helper.argument_at
        seccomp.allow(self._filters, self.pid, ioctl_call(fd, request, at))
        try:
            if isinstance(argument, bytes):
                memory.write(self.pid, at, argument)
            return helper.ioctl(fd, request, at)
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
                        helper.unmap_through(self._borrow(stack, but=helper.tracee.tid))
            finally:
                helper.leave()


@contextmanager
def _alone(pid: int) -> Iterator[None]:
    """No other mtetool maps or unmaps memory in the process meanwhile. Raises BusyError.

    The lock is on the process's own file in /proc, so that the death of its holder frees it.
    Where another mount of /proc hides two runs from each other, the marks in the memory itself
    (`remove_leftovers`) have to do.
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
