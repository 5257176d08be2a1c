"""What the tags of a source look like: how many of each, how long their runs, how often equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mtetool import loops
from mtetool.guest import Extent, Memslot, Missing
from mtetool.sources.copying import Fill, Step
from mtetool.sources.layout import by_slot, total_bytes
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.source import TagSource
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    Counts = NDArray[np.int64]

N_TAGS = 16
_N_LENGTHS = 61
# What `mtetool.loops.tally` counts, and the state of it that follows.
_N_COUNTS = 2 * N_TAGS + 2 * _N_LENGTHS + 3
_TAG, _BEFORE, _LENGTH = range(_N_COUNTS, _N_COUNTS + 3)


@dataclass
class TagCounts:
    """What was counted in some memory; `size_bytes` includes what could not be read.

    `numbers` are as for `mtetool.loops.tally`.
    """

    size_bytes: int = 0
    missing_bytes: int = 0
    numbers: Counts = field(default_factory=lambda: np.zeros(_N_COUNTS, dtype=np.int64))
    last_runs: int = 0
    """Tagged runs that end where nothing can be read after them."""

    @property
    def granules(self) -> Counts:
        """Granules by tag, 16 of them."""
        return self.numbers[:N_TAGS]

    @property
    def runs(self) -> Counts:
        """Runs by tag, 16 of them."""
        return self.numbers[N_TAGS : 2 * N_TAGS]

    @property
    def lengths(self) -> Counts:
        """Tagged runs by length: number n is for 2^n to 2^(n+1) - 1 granules."""
        return self.numbers[2 * N_TAGS : 2 * N_TAGS + _N_LENGTHS]

    @property
    def length_granules(self) -> Counts:
        """The granules in those runs."""
        return self.numbers[2 * N_TAGS + _N_LENGTHS : -3]

    @property
    def longest(self) -> int:
        """The longest tagged run, in granules."""
        return int(self.numbers[-3])

    def add(self, other: TagCounts) -> None:
        """Count what `other` counted, too."""
        self.size_bytes += other.size_bytes
        self.missing_bytes += other.missing_bytes
        longest = max(self.longest, other.longest)
        self.numbers += other.numbers
        self.numbers[-3] = longest
        self.last_runs += other.last_runs

    @property
    def n_granules(self) -> int:
        """Granules that were read."""
        return int(self.granules.sum())

    @property
    def tagged_granules(self) -> int:
        """Granules with a tag other than 0."""
        return int(self.granules[1:].sum())

    @property
    def tagged_runs(self) -> int:
        """Runs of a tag other than 0."""
        return int(self.runs[1:].sum())

    @property
    def tagged_share(self) -> float | None:
        """The share of granules that have a tag other than 0; None without granules."""
        return _share(self.tagged_granules, self.n_granules)

    @property
    def same_next_share(self) -> float | None:
        """The share of tagged granules whose next granule has the same tag."""
        pairs = self.tagged_granules - self.last_runs
        return _share(self.tagged_granules - self.tagged_runs, pairs)

    @property
    def skip_one_share(self) -> float | None:
        """The share of tagged runs for which the run after the next has the same tag."""
        return _share(int(self.numbers[-1]), int(self.numbers[-2]))

    @property
    def entropy_bits(self) -> float | None:
        """Shannon's entropy of the tags of tagged granules; at most log2(15), 3.907."""
        return _entropy(self.granules[1:])

    @property
    def run_entropy_bits(self) -> float | None:
        """The same for tagged runs, each of which counts once."""
        return _entropy(self.runs[1:])

    @property
    def collision_share(self) -> float | None:
        """The probability that two tagged granules, chosen at random, have the same tag."""
        return _collisions(self.granules[1:])

    @property
    def run_collision_share(self) -> float | None:
        """The same for tagged runs, each of which counts once."""
        return _collisions(self.runs[1:])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole > 0 else None


def _entropy(counts: Counts) -> float | None:
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    # Not -0.0 for a single tag.
    return abs(float((shares * np.log2(shares)).sum())) if shares.size else None


def _collisions(counts: Counts) -> float | None:
    n = int(counts.sum())
    return float(((counts / n) ** 2).sum()) if n else None


@dataclass
class Statistics:
    """Counts of all that was asked, and of each slot that has a part of it."""

    total: TagCounts
    slots: list[tuple[Memslot, TagCounts]]
    missing: Tally[Missing]


class Consumer(Protocol):
    """Something else that looks at the tags while they are counted."""

    def add(self, step: Step) -> None:
        """Look at a step."""
        ...


def statistics(
    source: TagSource,
    extents: Sequence[Extent],
    *,
    others: Sequence[Consumer] = (),
    progress: Progress = no_progress,
) -> Statistics:
    """Read `extents` once, in order of address, and count; runs end where a slot ends.

    The `others` see every step too. Raises what reading raises.
    """
    result = Statistics(TagCounts(), [], Tally())
    done, total = 0, total_bytes(extents)
    progress(0, total)
    for slot, parts in by_slot(source.memslots, extents):
        counter = _Counter()
        for step in source.read(parts):
            counter.add(step)
            if isinstance(step, Missing):
                result.missing.add(step)
            for other in others:
                other.add(step)
            done += step.size_bytes
            progress(done, total)
        counter.end()
        result.total.add(counter.counts)
        if slot is not None:
            result.slots.append((slot, counter.counts))
    return result


class _Counter:
    """Counts steps that come in order of address."""

    def __init__(self) -> None:
        self.counts = TagCounts()
        self._end: int | None = None
        self._state = np.zeros(_N_COUNTS + 3, dtype=np.int64)
        self._state[[_TAG, _BEFORE]] = -1

    def add(self, step: Step) -> None:
        self.counts.size_bytes += step.size_bytes
        if step.ipa != self._end:
            self._nothing_follows()
        self._end = step.ipa + step.size_bytes
        if isinstance(step, Missing):
            self.counts.missing_bytes += step.size_bytes
            self._nothing_follows()
        elif isinstance(step, Fill):
            loops.tally(bytes([step.tag]), step.size_bytes // GRANULE_BYTES, self._room)
        else:
            loops.tally(step.tags, 1, self._room)

    @property
    def _room(self) -> memoryview:
        return self._state.view(np.uint8).data

    def _nothing_follows(self) -> None:
        """Count the last run, which nothing can go on."""
        if self._state[_TAG] < 0:
            return
        self.counts.last_runs += bool(self._state[_TAG] > 0)
        # Another run closes it; that one is then forgotten.
        other = bytes([1 if self._state[_TAG] != 1 else 2])
        n_triples = self._state[_N_COUNTS - 2 : _N_COUNTS].copy()
        loops.tally(other, 1, self._room)
        self._state[_N_COUNTS - 2 : _N_COUNTS] = n_triples
        self._state[[_TAG, _BEFORE]] = -1

    def end(self) -> None:
        """Finish the counts."""
        self._nothing_follows()
        self.counts.numbers[:] = self._state[:_N_COUNTS]
