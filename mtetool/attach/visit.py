"""Requests to the kernel that need a stopped thread of the process, and nothing else.

One thread is stopped for as long as such a request takes, and let go; between two requests we are
not attached. No register and no memory of the process is used, so our death at any instant leaves
nothing behind: the kernel detaches, and the thread runs on (a thread that a signal had stopped
stays stopped). If mtetool is stopped while it holds a thread, a guard kills it
(`mtetool.attach.guard`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from mtetool.attach import steps
from mtetool.attach.exclusion import alone
from mtetool.attach.guard import Level, Watch
from mtetool.attach.held import HeldThreads
from mtetool.attach.ptrace import Tracee
from mtetool.attach.tracer import Tracer
from mtetool.errors import BusyError, GuestError, GuestLostError, NoSuchProcessError
from mtetool.permission import refusal, thread_has_ended

T = TypeVar("T")

# Threads that are made while others are being stopped are stopped in a further round; a process
# that makes them without end is given up.
_ROUNDS = 20


class Visitor:
    """Stops threads of process `pid`: one for the time of a visit, or all of them.

    `living` returns its threads, `ranked` the same with the best to stop first. `check` is called
    once a thread has stopped, and raises if the process is no longer the one that was meant.
    Usable from any thread of ours, one call at a time. Everything raises GuestError subclasses; the
    constructor raises HostError where this host can start no process or thread for us.
    """

    def __init__(
        self,
        pid: int,
        *,
        living: Callable[[], Iterable[int]],
        ranked: Callable[[], Iterable[int]],
        check: Callable[[], object],
    ) -> None:
        self.pid = pid
        self.stopped_seconds = 0.0
        """The longest time that a visit kept a thread stopped."""
        self._living = living
        self._ranked = ranked
        self._check = check
        self._best: int | None = None
        self._held = HeldThreads(pid)
        self._frozen = ExitStack()
        self._watch = Watch()
        try:
            self._tracer = Tracer(pid, idle=self._reap)
        except BaseException:
            self._watch.close()
            raise

    def visit(self, function: Callable[[Tracee], T]) -> T:
        """Return or raise what `function` does, given a thread that is stopped meanwhile."""
        return self._tracer.call(lambda: self._visit(function))

    def freeze(self) -> None:
        """Stop all threads, including those made meanwhile; visits then use one of them."""
        self._tracer.call(self._freeze)

    def thaw(self) -> None:
        """Let all threads run on."""
        self._tracer.call(self._thaw)

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._tracer.stuck or not self._tracer.alive:
            return
        try:
            self._tracer.call(self._thaw)
        finally:
            self._tracer.close()
            if not self._tracer.alive:
                self._watch.close()

    # --- in the tracing thread -----------------------------------------------------------

    def _visit(self, function: Callable[[Tracee], T]) -> T:
        steps.enter("visit")
        if self._held.tracees:
            return self._among_held(function)
        with ExitStack() as stack:
            self._be_alone(stack)
            stack.enter_context(self._watch.holding())
            for tid in self._candidates():
                if (tracee := self._seize(tid)) is not None:
                    with suppress(ProcessLookupError), self._stopped(tracee):
                        result = function(tracee)
                        self._best = tid
                        return result
        raise self._gone()

    def _among_held(self, function: Callable[[Tracee], T]) -> T:
        self._check()
        for tracee in self._held.tracees:
            with suppress(ProcessLookupError):
                return function(tracee)
        raise self._gone()

    def _candidates(self) -> Iterator[int]:
        if self._best is not None:
            yield self._best
        yield from self._ranked()

    def _seize(self, tid: int) -> Tracee | None:
        try:
            return Tracee.seize(tid)
        except OSError as error:
            if thread_has_ended(self.pid, tid):
                return None
            raise self._refusal(error) from error

    @contextmanager
    def _stopped(self, tracee: Tracee) -> Iterator[None]:
        """Stop the thread, then let it go. Raises ProcessLookupError if it is not `pid`'s."""
        since = time.monotonic()
        try:
            try:
                tracee.stop()
            except GuestLostError:
                raise ProcessLookupError from None
            self._check()
            # The thread's id, too, may belong to another process by now.
            Path(f"/proc/{self.pid}/task/{tracee.tid}/stat").read_bytes()
            yield
        except FileNotFoundError:
            raise ProcessLookupError from None
        finally:
            with suppress(ProcessLookupError):
                tracee.detach()
            self.stopped_seconds = max(self.stopped_seconds, time.monotonic() - since)

    def _freeze(self) -> None:
        steps.enter("freeze")
        self._be_alone(self._frozen)
        self._watch.level = Level.HOLDING
        try:
            for _ in range(_ROUNDS):
                if not self._held.hold(self._living()):
                    break
            else:
                raise BusyError(
                    f"process {self.pid} makes threads faster than mtetool can stop them",
                    hint=f"try again, or stop the process first: kill -STOP {self.pid}",
                    pid=self.pid,
                )
            if not self._held.tracees:
                raise self._gone()
            self._check()
        except BaseException:
            self._thaw()
            raise

    def _thaw(self) -> None:
        steps.enter("thaw")
        self._held.release()
        self._watch.level = Level.NOTHING
        self._frozen.close()

    def _be_alone(self, stack: ExitStack) -> None:
        try:
            stack.enter_context(alone(self.pid))
        except OSError as error:
            raise self._refusal(error) from error

    def _reap(self) -> None:
        # An unreaped thread that we traced keeps its process a zombie. This reaps all of them.
        Tracee(self.pid).ended()

    def _refusal(self, error: OSError) -> GuestError:
        refused = refusal(self.pid, error)
        return self._gone() if isinstance(refused, NoSuchProcessError) else refused

    def _gone(self) -> GuestLostError:
        return GuestLostError(
            f"process {self.pid} ended while mtetool was working on it",
            hint="find out why it ended; mtetool does not end it",
            pid=self.pid,
        )
