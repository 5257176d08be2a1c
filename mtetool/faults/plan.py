"""Which faults fire in a copy, and where: decided before it, counted after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtetool.faults.model import Delay, Direction, Fail, Fault, Faults, Rate, Vanish

_Pages = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The pages of one copy."""

    direction: Direction
    ipa: int
    n_pages: int
    page_size_bytes: int


@dataclass(frozen=True, slots=True)
class _Watching:
    """A fault in this copy: the pages `first` to `end` that it watches, and where it fires."""

    index: int
    first: int
    end: int
    fires: _Pages


class Plan:
    """What the faults will do to a copy.

    `n_pages` is how many pages get through; `stopped_by` the fault that stops the copy after them,
    if any.
    """

    def __init__(self, faults: Faults, stretch: Stretch) -> None:
        self._faults = faults
        self._stretch = stretch
        self._watching = [
            watching
            for index, fault in enumerate(faults.ordered)
            if (watching := _watch(faults, index, fault, stretch)) is not None
        ]
        self.n_pages = stretch.n_pages
        self._stop: int | None = None
        for watching in self._watching:
            effect = faults.ordered[watching.index].effect
            stops = isinstance(effect, Fail | Vanish)
            if stops and watching.fires.size and watching.fires[0] < self.n_pages:
                self.n_pages, self._stop = int(watching.fires[0]), watching.index

    @property
    def stopped_by(self) -> Fault | None:
        """The fault that stops the copy."""
        return None if self._stop is None else self._faults.ordered[self._stop]

    def settle(self, done: int) -> float:
        """Count a copy that completed `done` pages; return the seconds to delay it.

        A fault that stops a copy has fired once its errno can be returned: if nothing was done.
        """
        seconds = 0.0
        for watching in self._watching:
            counted = self._faults.counted[watching.index]
            if watching.first == 0:
                counted.copies += 1
            counted.pages += max(0, min(watching.end, done) - watching.first)
            effect = self._faults.ordered[watching.index].effect
            if isinstance(effect, Delay | Rate):
                held_up = int(np.count_nonzero(watching.fires < done))
                counted.fired += held_up
                page = self._stretch.page_size_bytes
                seconds += effect.seconds_for(held_up * page, page)
        if self._stop is not None and done == self.n_pages:
            self._stop_at(self._stop, done)
        return seconds

    def _stop_at(self, index: int, done: int) -> None:
        counted = self._faults.counted[index]
        vanishes = isinstance(self._faults.ordered[index].effect, Vanish)
        if not done or vanishes:
            counted.fired += 1
            self._faults.vanished = vanishes
        if done:
            return
        # The copy reached this page: it counts, so that chance moves on to the next number.
        for watching in self._watching:
            if watching.first == 0 and watching.end > 0:
                self._faults.counted[watching.index].pages += 1


def _watch(faults: Faults, index: int, fault: Fault, stretch: Stretch) -> _Watching | None:
    """What a fault sees of a copy; None if it sees nothing."""
    if fault.on not in (None, stretch.direction) or faults.is_spent(index):
        return None
    first, end = _within(fault.at, stretch)
    if first >= end:
        return None
    counted = faults.counted[index]
    start = min(end, first + max(0, fault.after - counted.pages))
    fires = np.arange(start, end, dtype=np.int64)
    if fault.every != 1:
        due = first == 0 and (counted.copies + 1) % fault.every == 0
        fires = fires[fires == 0] if due else fires[:0]
    if fault.chance < 1.0:
        numbers = fires - first + counted.pages
        fires = fires[_drawn(fault.seed, numbers) < fault.chance]
    if fault.times is not None:
        fires = fires[: fault.times - counted.fired]
    return _Watching(index, first, end, fires)


def _within(at: tuple[int, int] | None, stretch: Stretch) -> tuple[int, int]:
    """The pages, by number in the copy, that a range of addresses touches."""
    if at is None:
        return 0, stretch.n_pages
    page = stretch.page_size_bytes
    first = (at[0] - stretch.ipa) // page
    end = -(-(at[0] + at[1] - stretch.ipa) // page)
    return max(0, first), min(stretch.n_pages, end)


def _drawn(seed: int, numbers: _Pages) -> NDArray[np.float64]:
    """A number in [0, 1) for each of `numbers`: always the same, in whatever pieces they come.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), whose
    n-th number can be made without those before it.
    """
    start = _mixed(np.array([seed], dtype=np.uint64))
    step = np.uint64(0x9E3779B97F4A7C15)
    mixed = _mixed(start + (numbers.astype(np.uint64) + np.uint64(1)) * step)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
