"""The one OS thread of ours that does all tracing of a process.

Only the thread that attached can use ptrace. Every request to it has a timeout: a process that its
cgroup has frozen, or that is stuck in the kernel, does not answer.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar, cast

from mtetool.errors import BusyError, no_thread

T = TypeVar("T")

# A call that takes longer is stuck: mtetool then ends, which is safe; hanging is not. Memory that
# is paged in from swap can hold up a call.
CALL_PATIENCE_SECONDS = 60.0
ATTACH_PATIENCE_SECONDS = 20.0
_IDLE_SECONDS = 0.1
_SWITCH_SECONDS = 0.0005


class Tracer:
    """Runs functions in the thread that traces process `pid`, one at a time.

    It runs `idle` there after every tenth of a second without a request. Raises HostError where no
    more threads can be started.
    """

    def __init__(self, pid: int, *, idle: Callable[[], None]) -> None:
        self._pid = pid
        self._idle = idle
        self.stuck = False
        """Whether a function did not return; then the thread gets no more requests."""
        self._requests: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None]
        self._requests = queue.SimpleQueue()
        # Between two copies the guest waits for this thread, whatever the others compute.
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise no_thread(f"attaching to process {pid}", error) from error

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended yet."""
        return self._thread.is_alive()

    def call(self, function: Callable[[], T], patience: float = CALL_PATIENCE_SECONDS) -> T:
        """Return or raise what `function` does. Raises BusyError if it takes longer than that."""
        return self.finish(self.begin(function), patience)

    def begin(self, function: Callable[[], T]) -> Future[T]:
        """Have `function` run once all before it are done; `finish` returns its result."""
        if self.stuck:
            raise self._no_answer(CALL_PATIENCE_SECONDS)
        future: Future[T] = Future()
        self._requests.put((cast("Future[object]", future), function))
        return future

    def finish(self, future: Future[T], patience: float = CALL_PATIENCE_SECONDS) -> T:
        """Wait for a function that was begun; as `call`."""
        if self.stuck and not future.done():
            raise self._no_answer(patience)
        try:
            return future.result(patience)
        except TimeoutError:
            self.stuck = True
            raise self._no_answer(patience) from None

    def close(self) -> None:
        """End the thread, which lets go of everything that it still traces."""
        self._requests.put(None)
        self._thread.join(CALL_PATIENCE_SECONDS)

    def _no_answer(self, patience: float) -> BusyError:
        return BusyError(
            f"process {self._pid} did not answer for {patience:.0f} seconds",
            hint="check whether it is frozen (by a cgroup's freezer) or waits in the kernel for a"
            " disk or a userfaultfd that does not answer (post-copy migration, a VM resumed from a"
            " snapshot); mtetool lets go of it when it ends, and the process goes on when it can",
            pid=self._pid,
        )

    def _run(self) -> None:
        while True:
            try:
                request = self._requests.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._idle()
                continue
            if request is None:
                return
            future, function = request
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it is raised on the caller's side
                future.set_exception(error)
