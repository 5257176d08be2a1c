"""A helper thread inside the process, which makes ioctls for us while the other threads run on.

A thread of the process is borrowed for a moment, to map a transfer buffer and to start the
helper; it goes home before the first ioctl, so the process's main loop responds during a
long copy. The helper has no state of its own. If mtetool vanishes, it finishes its call,
unmaps the buffer and exits.

Whatever the rest of mtetool does, the tracing thread (`mtetool.attach.tracer`) notices and reaps
within a moment a process that ends. If mtetool is stopped, a guard kills it
(`mtetool.attach.guard`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mtetool import procfs
from mtetool.attach import memory, seccomp, steps
from mtetool.attach.borrow import BorrowedThread
from mtetool.attach.exclusion import alone
from mtetool.attach.guard import Level, Watch
from mtetool.attach.held import HeldThreads
from mtetool.attach.helper import (
    Helper,
    ioctl_call,
    map_bytes,
    needed_calls,
    remove_leftovers,
    start_helper,
)
from mtetool.attach.ptrace import Registers
from mtetool.attach.tracer import ATTACH_PATIENCE_SECONDS, CALL_PATIENCE_SECONDS, Tracer
from mtetool.errors import (
    AttachRefusedError,
    GuestError,
    GuestLostError,
)
from mtetool.permission import refusal

if TYPE_CHECKING:
    from mtetool.attach.chain import Chain

T = TypeVar("T")

# How many threads are tried when one after another cannot be borrowed safely.
_MOST_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Target:
    """The process to attach to, and what its caller knows about it.

    `ioctls` are the (fd, request) pairs that will be made, to be checked against the seccomp
    filters. `candidates` returns the threads that may be borrowed, the best first; `check` raises
    if the process is not the one that was meant (a PID can be reused).
    """

    pid: int
    ioctls: tuple[tuple[int, int], ...]
    candidates: Callable[[], Sequence[int]]
    check: Callable[[], object]


class Session:
    """Makes calls inside the process through a helper thread, until `close`.

    `buffer_bytes` is the size of the transfer buffer. Usable from any thread of ours, one call
    at a time. Raises GuestError subclasses where no thread of the process can be borrowed, and
    HostError where this host can start no process or thread for us; then nothing was touched.
    """

    def __init__(self, target: Target, *, buffer_bytes: int) -> None:
        self.pid = target.pid
        self.buffer_bytes = buffer_bytes
        self.borrowed_seconds = 0.0
        self._target = target
        self._helper: Helper | None = None
        self._held = HeldThreads(target.pid)
        self._filters: tuple[seccomp.Program, ...] = ()
        self._allowed: set[tuple[int, int, int]] = set()
        self._chains: dict[tuple[int, int], Chain | None] = {}
        self._lost: GuestLostError | None = None
        self._watch = Watch()
        try:
            self._tracer = Tracer(target.pid, idle=self._reap)
        except BaseException:
            self._watch.close()
            raise
        self._watch.level = Level.ATTACHED
        try:
            self._call(self._attach, ATTACH_PATIENCE_SECONDS)
        except BaseException:
            # A signal to mtetool may come while the tracer is still attaching.
            self.close()
            raise

    def ioctl(self, fd: int, request: int, argument: bytes | int) -> int:
        """Make an ioctl(2) in the process, on its file descriptor; return the result, or -errno.

        An argument in bytes is copied there first. Raises GuestLostError, and AttachRefusedError
        where the process's seccomp filter does not allow it.
        """
        return self._call(lambda: self._ioctl(fd, request, argument))

    def begin_ioctl(self, fd: int, request: int, argument: bytes | int) -> Future[int]:
        """As `ioctl`, without waiting; `finish` returns the result. Other calls come after it."""
        return self._tracer.begin(
            lambda: self._noting_loss(lambda: self._ioctl(fd, request, argument))
        )

    def begin_chain(self, fd: int, request: int, arguments: bytes) -> Future[bool]:
        """Make many ioctls, one for each `chain_room.ARGUMENT_BYTES` of arguments, in order.

        There may be `chain_room.MOST_CALLS`. `finish` returns True when all were made; what each
        returned is not known. It returns False, and none was made, if this process allows no chain:
        then make them one by one.
        """
        return self._tracer.begin(
            lambda: self._noting_loss(lambda: self._run_chain(fd, request, arguments))
        )

    def finish(self, begun: Future[T], patience: float = CALL_PATIENCE_SECONDS) -> T:
        """Return the result of what was begun; raises as `ioctl`.

        After a call that took longer than `patience` (BusyError), the session cannot be used.
        """
        return self._tracer.finish(begun, patience)

    @property
    def buffer_address(self) -> int:
        """Where the transfer buffer is in the process."""
        return self._alive().buffer_at

    def read_buffer(self, out: memoryview, offset: int = 0) -> None:
        """Fill `out` from the transfer buffer, from `offset` on. Raises GuestLostError."""
        self._copy(memory.read_into, out, offset)

    def write_buffer(self, data: memoryview, offset: int = 0) -> None:
        """Copy `data` to the transfer buffer, from `offset` on. Raises GuestLostError."""
        self._copy(memory.write_from, data, offset)

    def mappings(self) -> list[procfs.Mapping]:
        """The process's mappings. Raises GuestLostError."""
        try:
            return procfs.mappings(self.pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise self._gone() from error

    @property
    def helper_tid(self) -> int:
        """The helper thread's id."""
        return self._alive().tracee.tid

    def hold(
        self, tids: Iterable[int], patience: float = CALL_PATIENCE_SECONDS
    ) -> dict[int, Registers]:
        """Stop and hold threads; return their registers, leaving out threads that have ended.

        Ptrace alone holds them: whatever becomes of us, they run on. Signals to them wait. Raises
        GuestLostError; BusyError if they do not all stop in time, as after `finish`.
        """
        return self._call(lambda: self._hold(tids), patience)

    def release(self, tids: Iterable[int] | None = None) -> None:
        """Let held threads run on: these, or all. Raises GuestLostError."""
        self._call(lambda: self._release(tids))

    def close(self) -> None:
        """End the helper and unmap its memory; nothing of ours stays. Idempotent."""
        if self._tracer.stuck or not self._tracer.alive:
            return
        try:
            self._call(self._let_go)
        finally:
            self._tracer.close()
            # A stuck tracing thread lets go when we end; the guard watches until then.
            if not self._tracer.alive:
                self._watch.close()

    # --- on the caller's side ---------------------------------------------------------

    def _call(self, function: Callable[[], T], patience: float = CALL_PATIENCE_SECONDS) -> T:
        return self._tracer.call(lambda: self._noting_loss(function), patience)

    def _alive(self) -> Helper:
        if self._lost is not None:
            raise self._lost
        if self._helper is None:
            raise GuestLostError(f"mtetool is not attached to process {self.pid}")
        return self._helper

    def _copy(
        self, copy: Callable[[int, int, memoryview], None], data: memoryview, offset: int
    ) -> None:
        address = self.buffer_address + offset
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
            hint="find out why the VMM ended; mtetool does not end it",
        )

    # --- on the tracer's side -----------------------------------------------------------

    def _noting_loss(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except GuestLostError as error:
            self._lost = error
            raise
        except ProcessLookupError:
            self._lost = self._gone()
            raise self._lost from None

    def _reap(self) -> None:
        # Also for a process known to be lost: an unreaped thread keeps it a zombie.
        if self._helper is not None and self._helper.tracee.ended() and self._lost is None:
            self._lost = self._gone()

    def _attach(self) -> None:
        try:
            with alone(self.pid), self._watch.holding(), ExitStack() as stack:
                thread = self._borrow(stack)
                remove_leftovers(thread, map_bytes(self.buffer_bytes))
                self._helper = start_helper(thread, map_bytes(self.buffer_bytes))
        except OSError as error:
            raise refusal(self.pid, error) from error
        self.borrowed_seconds = thread.seconds
        self._filters = thread.filters

    def _borrow(self, stack: ExitStack, but: int = 0) -> BorrowedThread:
        """Borrow the first thread (not `but`) that is safe to borrow, until the stack unwinds."""
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
            f"process {self.pid} has no thread that can be borrowed", hint="try again"
        )

    def _ioctl(self, fd: int, request: int, argument: bytes | int) -> int:
        helper = self._alive()
        steps.enter("call")
        at = argument if isinstance(argument, int) else helper.argument_at
        if (fd, request, at) not in self._allowed:
            # The filters are those read at the attach: their answer stays the same.
            seccomp.allow(self._filters, self.pid, ioctl_call(fd, request, at))
            self._allowed.add((fd, request, at))
        try:
            if isinstance(argument, bytes):
                memory.write(self.pid, at, argument)
            return helper.ioctl(fd, request, at)
        except OSError as error:
            # An error on the way to the ioctl is not its answer.
            raise self._gone() from error

    def _run_chain(self, fd: int, request: int, arguments: bytes) -> bool:
        helper = self._alive()
        if (fd, request) not in self._chains:
            from mtetool.attach.chain import Chain

            chain = Chain(helper, fd, request)
            # The frames of all chains lie in the same place: only the last kind is laid.
            allowed = chain.is_allowed(self._filters)
            self._chains = {(fd, request): chain if allowed else None}
        made = self._chains[fd, request]
        try:
            return made is not None and made.run(arguments)
        except OSError as error:
            raise self._gone() from error

    def _hold(self, tids: Iterable[int]) -> dict[int, Registers]:
        self._alive()
        steps.enter("freeze")
        self._watch.level = Level.HOLDING
        registers = {}
        for tracee in self._held.hold(tids):
            with suppress(ProcessLookupError):
                registers[tracee.tid] = tracee.registers()
        return registers

    def _release(self, tids: Iterable[int] | None) -> None:
        steps.enter("thaw")
        self._held.release(tids)
        if not self._held.tracees:
            self._watch.level = Level.ATTACHED

    def _let_go(self) -> None:
        self._release(None)
        helper, self._helper = self._helper, None
        if helper is None or self._lost is not None:
            return
        # A process that ended took everything along; the next run removes whatever stays.
        with suppress(OSError, GuestError):
            try:
                if not helper.aim_at_its_end():
                    with alone(self.pid), self._watch.holding(), ExitStack() as stack:
                        helper.unmap_through(self._borrow(stack, but=helper.tracee.tid))
            finally:
                helper.leave()
