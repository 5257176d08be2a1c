"""A signal that ends mtetool is never lost, and leaves no lock taken."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType

import pytest

from mtetool import signals
from mtetool.errors import SignalError


def test_signals_are_ignored_for_a_while_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.raising():
        with pytest.raises(SignalError):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        monkeypatch.setattr(signals, "_UNWINDING_SECONDS", 0)
        with pytest.raises(SignalError):
            signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is before


class Thing:
    """Something that can be referred to weakly."""


def _waiting_for_a_signal(work: Callable[[], object]) -> None:
    work()
    threading.Event().wait(30)
    pytest.fail("the signal was lost")


def test_signal_in_a_finaliser_comes_again() -> None:
    things = [Thing()]
    called = weakref.ref(things[0], lambda _: signal.raise_signal(signal.SIGTERM))
    with signals.raising(), pytest.raises(SignalError):
        # Python prints an exception of the callback, and goes on.
        _waiting_for_a_signal(things.clear)
    assert called() is None


class Interrupting:
    """A profiler that sends a signal at the `last`th point where Python would call a handler."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.points = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "c_return"):
            return
        self.points += 1
        if self.points == self.last:
            sys.setprofile(None)
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)
            handler(signal.SIGTERM, frame)

    def run(self, work: Callable[[], object]) -> None:
        """Run that; if it has fewer points, the signal comes afterwards."""
        sys.setprofile(self)
        try:
            work()
        finally:
            sys.setprofile(None)
        if self.points < self.last:
            signal.raise_signal(signal.SIGTERM)


def _interrupted_at_each_point(begin: Callable[[], Callable[[], object]]) -> int:
    """Interrupt what `begin` returns at its first point, its second, and so on; return how many."""
    for point in count(1):
        profiler = Interrupting(point)
        with signals.raising(), suppress(SignalError):
            _waiting_for_a_signal(partial(profiler.run, begin()))
        if profiler.points < point:
            return profiler.points
    raise AssertionError


def _is_free(condition: threading.Condition) -> bool:
    # Asked by another thread: the lock is one that its owner may take again.
    found = []

    def ask() -> None:
        found.append(condition.acquire(blocking=False))
        if found[0]:
            condition.release()

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    return bool(found[0])


def test_waiting_for_a_result_leaves_no_lock_taken() -> None:
    waited_for: list[Future[int]] = []

    def begin() -> Callable[[], object]:
        future: Future[int] = Future()
        waited_for.append(future)

        def wait() -> None:
            try:
                future.result(0.001)
            except TimeoutError:
                future.set_result(1)
                future.result()

        return wait

    assert _interrupted_at_each_point(begin) > 20
    assert all(_is_free(future._condition) for future in waited_for)


def test_process_that_is_being_started_is_not_forgotten() -> None:
    def begin() -> Callable[[], object]:
        def work() -> None:
            with subprocess.Popen(["true"]) as process:
                process.wait()

        return work

    assert _interrupted_at_each_point(begin) > 50
    assert not [stat for stat in _stats() if stat[:1] == ["(true)"] and stat[2] == str(os.getpid())]


def _stats() -> Iterator[list[str]]:
    """The name, state and parent of each process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            yield path.read_text().split()[1:4]


def test_threads_are_started_and_ended_or_not_at_all() -> None:
    def begin() -> Callable[[], object]:
        def work() -> None:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(int).result()

        return work

    before = threading.active_count()
    assert _interrupted_at_each_point(begin) > 50
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_importing_a_module_does_not_swallow_it() -> None:
    def begin() -> Callable[[], object]:
        sys.modules.pop("wave", None)

        def work() -> None:
            import wave  # noqa: F401 - a small one

        return work

    assert _interrupted_at_each_point(begin) > 50


def test_signal_in_a_callback_of_an_event_loop_ends_the_loop() -> None:
    async def wait() -> None:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        await asyncio.sleep(30)

    with signals.raising(), pytest.raises(SignalError):
        asyncio.run(wait())


def test_signal_in_a_task_of_an_event_loop_ends_the_task() -> None:
    async def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal came later")

    with signals.raising(), pytest.raises(SignalError):
        asyncio.run(work())


def test_a_delay_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_LONGEST_DELAY_SECONDS", 0.1)
    # As a handler sees it whose process hangs in the library's own code.
    scope = {"__name__": "threading", "time": time}
    sending = threading.Timer(0.01, signal.raise_signal, [signal.SIGTERM])
    with signals.raising():
        sending.start()
        with pytest.raises(SignalError):
            exec("while True: time.sleep(0.01)", scope)  # noqa: S102


def test_before_an_exec_a_delayed_signal_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_AGAIN_SECONDS", 0.5)
    with signals.raising():
        signals.raise_delayed()
        scope = {"__name__": "threading", "signal": signal}
        exec("signal.raise_signal(signal.SIGTERM)", scope)  # noqa: S102
        with pytest.raises(SignalError):
            signals.raise_delayed()
