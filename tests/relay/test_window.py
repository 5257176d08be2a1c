"""The window keeps little on the way, and the way busy, however long and however fast it is."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.relay.channel import READ_BYTES
from mtetool.relay.window import Window


@dataclass
class _Way:
    """A source that always has data, a way of `seconds` there and back, and a QEMU that loads.

    Records have `record_bytes`; QEMU loads `rate` of them a second.
    """

    seconds: float
    rate: float
    record_bytes: int
    now: float = 0.0
    loaded_at: float = 0.0
    coming: list[tuple[float, int]] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    n_sent: int = 0
    n_taken: int = 0

    def __post_init__(self) -> None:
        self.window = Window(lambda: self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            while n_bytes := self.window.room_bytes:
                self._send(n_bytes)
            self.now, total = heapq.heappop(self.coming)
            self.n_taken = total
            assert self.window.taken(total)

    def _send(self, n_bytes: int) -> None:
        n_records = max(n_bytes // self.record_bytes, 1)
        self.window.sent(n_bytes, n_records)
        self.n_sent += n_bytes
        arrived = self.now + self.seconds / 2
        self.waited.append(max(self.loaded_at - arrived, 0.0))
        self.loaded_at = max(self.loaded_at, arrived) + n_records / self.rate
        heapq.heappush(self.coming, (self.loaded_at + self.seconds / 2, self.n_sent))


@given(
    seconds=st.floats(0.0001, 0.2),
    rate=st.floats(20_000, 2_000_000),
    record_bytes=st.sampled_from([9, 4105]),
)
def test_the_way_is_busy_and_nothing_waits_long(
    seconds: float, rate: float, record_bytes: int
) -> None:
    way = _Way(seconds, rate, record_bytes)
    way.run(30 * seconds + 1)
    way.waited.clear()
    n_taken, now = way.n_taken, way.now
    way.run(20 * seconds + 1)
    loaded = (way.n_taken - n_taken) / record_bytes / (way.now - now)
    assert loaded > 0.9 * rate
    # A part of the way's own time is room to become faster.
    assert max(way.waited) < 0.1 + seconds


def test_an_idle_destination_lets_little_in() -> None:
    window = Window(lambda: 0.0)
    n_sent = 0
    while n_bytes := window.room_bytes:
        window.sent(n_bytes, n_bytes // 9)
        n_sent += n_bytes
    assert 0 < n_sent < READ_BYTES
    assert window.taken(n_sent)
    assert window.room_bytes


def test_what_cannot_have_been_taken() -> None:
    window = Window()
    window.sent(100, 1)
    assert window.taken(60)
    assert not window.taken(59)
    assert not window.taken(101)
    assert window.taken(100)


def test_a_slower_destination_gets_less_soon() -> None:
    way = _Way(0.001, 2_000_000, 4105)
    way.run(2)
    fast = way.window.size
    way.rate = 20_000
    way.run(2)
    assert way.window.size < fast / 10


@pytest.mark.parametrize("n_bytes", [1, READ_BYTES])
def test_what_is_read_has_bounds(n_bytes: int) -> None:
    window = Window(lambda: 0.0)
    window.sent(n_bytes, 0)
    window.taken(n_bytes)
    assert 0 < window.room_bytes <= READ_BYTES
