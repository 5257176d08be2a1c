"""Calls that may never return, made in a thread of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar, cast

from mtetool.closing import Closing
from mtetool.errors import no_thread
from mtetool.vmm.qmp import Patience

_Held = TypeVar("_Held")
_Result = TypeVar("_Result")

_Answer = tuple[Exception | None, object]

# Hanging up needs an answer of the other side, too.
_FAREWELL_SECONDS = 1.0


class Worker(Closing, Generic[_Held]):
    """A thread that makes calls on an object, one after the other.

    `make` builds the object in that thread. It is used there only, and freed there: freeing it may
    hang as well. A call that is not answered in time is abandoned, together with the thread, which
    does not keep the program from ending. SIGINT ends the waiting.
    """

    def __init__(self, name: str, make: Callable[[], _Held], patience: Patience) -> None:
        self._patience = patience
        self._requests: SimpleQueue[Callable[[_Held], object] | None] = SimpleQueue()
        self._answers: SimpleQueue[_Answer] = SimpleQueue()
        self._is_waiting = False
        self._thread = threading.Thread(
            target=_serve, args=(make, self._requests, self._answers), name=name, daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:
            raise no_thread(f"asking {name}", error) from error

    def ask(self, call: Callable[[_Held], _Result]) -> _Result:
        """Return what `call` returns for the object.

        Raises TimeoutError, also for every call after one that was abandoned; and what it raises.
        """
        if self._is_waiting:
            raise TimeoutError  # a late answer would be taken for that to this call
        self._is_waiting = True
        with self._patience.spent() as deadline:
            self._requests.put(call)
            try:
                left = max(deadline - time.monotonic(), 0.0)
                failure, result = self._answers.get(timeout=left)
            except Empty:
                raise TimeoutError from None
        self._is_waiting = False
        if failure is not None:
            raise failure
        return cast(_Result, result)

    def close(self) -> None:
        """Let the thread free the object and end; it is not waited for long. Idempotent."""
        self._requests.put(None)
        if not self._is_waiting:
            self._thread.join(_FAREWELL_SECONDS)


def _serve(
    make: Callable[[], Any],
    requests: SimpleQueue[Callable[[Any], object] | None],
    answers: SimpleQueue[_Answer],
) -> None:
    held = make()
    while (call := requests.get()) is not None:
        answers.put(_answer(call, held))


def _answer(call: Callable[[Any], object], held: object) -> _Answer:
    try:
        return None, call(held)
    except Exception as error:  # noqa: BLE001 - it is raised again where the call was asked for
        # Its frames refer to the object, which must not be freed elsewhere.
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None), None
