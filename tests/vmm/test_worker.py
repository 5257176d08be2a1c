"""Calls that hang are left behind, with everything that belongs to them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from mtetool.errors import HostError
from mtetool.vmm.qmp import Patience
from mtetool.vmm.worker import Worker


class _Held:
    """Knows the thread that it lives in, and the one that it is freed in."""

    def __init__(self, freed: list[str]) -> None:
        self.made_in = threading.current_thread().name
        self._freed = freed

    def __del__(self) -> None:
        self._freed.append(threading.current_thread().name)


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """A call that waits for this hangs until the test ends."""
    event = threading.Event()
    yield event
    event.set()


def _worker(freed: list[str], seconds: float = 20.0) -> Worker[_Held]:
    return Worker("libvirt", lambda: _Held(freed), Patience(seconds))


def test_object_lives_and_ends_in_the_thread() -> None:
    freed: list[str] = []
    with _worker(freed) as worker:
        assert worker.ask(lambda held: held.made_in) == "libvirt"
        with pytest.raises(KeyError):  # whose frames know the object
            worker.ask(lambda held: dict[str, str]()[held.made_in])
        assert freed == []
    assert freed == ["libvirt"]


def test_call_that_hangs_is_left_and_no_other_is_made(hang: threading.Event) -> None:
    asked = []
    worker = _worker([], 0.2)
    since = time.monotonic()
    with pytest.raises(TimeoutError):
        worker.ask(lambda held: hang.wait())
    for _ in range(2):
        with pytest.raises(TimeoutError):
            worker.ask(lambda held: asked.append("late"))
    worker.close()
    assert time.monotonic() - since < 5
    assert asked == []


def test_all_calls_share_the_time() -> None:
    with _worker([], 0.5) as worker:
        worker.ask(lambda held: time.sleep(0.3))
        with pytest.raises(TimeoutError):
            worker.ask(lambda held: time.sleep(0.3))


def test_late_answer_is_not_taken_for_another(hang: threading.Event) -> None:
    worker = _worker([], 0.1)
    with pytest.raises(TimeoutError):
        worker.ask(lambda held: hang.wait() and "late")
    hang.set()
    time.sleep(0.1)
    with pytest.raises(TimeoutError):
        worker.ask(lambda held: "second")
    worker.close()


def test_signal_ends_the_waiting(hang: threading.Event) -> None:
    class _InterruptError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise _InterruptError

    before = signal.signal(signal.SIGALRM, interrupt)
    worker = _worker([])
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        since = time.monotonic()
        with pytest.raises(_InterruptError):
            worker.ask(lambda held: hang.wait())
        worker.close()
        assert time.monotonic() - since < 5
    finally:
        signal.signal(signal.SIGALRM, before)
    with suppress(TimeoutError):
        pytest.fail(str(worker.ask(lambda held: "answered")))


def test_freeing_that_hangs_is_left(hang: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    class _Stuck:
        def __del__(self) -> None:
            hang.wait()

    monkeypatch.setattr("mtetool.vmm.worker._FAREWELL_SECONDS", 0.1)
    worker = Worker("libvirt", _Stuck, Patience())
    since = time.monotonic()
    worker.close()
    worker.close()
    assert time.monotonic() - since < 5


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(HostError, match="EAGAIN"):
        _worker([])
