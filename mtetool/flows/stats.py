"""What the tags of a source look like: how many of each, how long their runs, how often equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mtetool.guest import Extent, Memslot, Missing
from mtetool.sources.copying import Fill, Step
from mtetool.sources.layout import by_slot, total_bytes
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.source import TagSource
from mtetool.sources.tally import Tally
from mtetool.tags import as_array, runs
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.tags import Tags

    Counts = NDArray[np.int64]

N_TAGS = 16
# Runs are at most 2^60 granules long.
_N_LENGTHS = 61
# Granules to look at in one go: what is made of them fits into a cache.
_BLOCK_GRANULES = 1 << 16


def _zeros(n: int) -> Counts:
    return np.zeros(n, dtype=np.int64)


@dataclass
class TagCounts:
    """What was counted in some memory; `size_bytes` includes what could not be read.

    `granules` and `runs` are counted by tag (16 of each), `lengths` and `length_granules` are the
    tagged runs by length: number n is for 2^n to 2^(n+1) - 1 granules. `longest` is the longest
    tagged run, in granules.
    """

    size_bytes: int = 0
    missing_bytes: int = 0
    granules: Counts = field(default_factory=lambda: _zeros(N_TAGS))
    runs: Counts = field(default_factory=lambda: _zeros(N_TAGS))
    lengths: Counts = field(default_factory=lambda: _zeros(_N_LENGTHS))
    length_granules: Counts = field(default_factory=lambda: _zeros(_N_LENGTHS))
    longest: int = 0
    last_runs: int = 0
    """Tagged runs that end where nothing can be read after them."""
    next_but_one: int = 0
    """Tagged runs that have a run after the next one."""
    next_but_one_same: int = 0
    """Those of them for which it has the same tag."""

    def add(self, other: TagCounts) -> None:
        """Count what `other` counted, too."""
        self.size_bytes += other.size_bytes
        self.missing_bytes += other.missing_bytes
        self.granules += other.granules
        self.runs += other.runs
        self.lengths += other.lengths
        self.length_granules += other.length_granules
        self.longest = max(self.longest, other.longest)
        self.last_runs += other.last_runs
        self.next_but_one += other.next_but_one
        self.next_but_one_same += other.next_but_one_same

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
        return _share(self.next_but_one_same, self.next_but_one)

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
        # The run that may go on, and the tag of the one before it.
        self._tag: int | None = None
        self._length = 0
        self._before: int | None = None

    def add(self, step: Step) -> None:
        self.counts.size_bytes += step.size_bytes
        if step.ipa != self._end:
            self.end()
        self._end = step.ipa + step.size_bytes
        if isinstance(step, Missing):
            self.counts.missing_bytes += step.size_bytes
            self.end()
        elif isinstance(step, Fill):
            length = np.array([step.size_bytes // GRANULE_BYTES])
            self._add_runs(np.array([step.tag], dtype=np.uint8), length)
        else:
            tags = as_array(step.tags)
            for first in range(0, tags.size, _BLOCK_GRANULES):
                _, lengths, values = runs(tags[first : first + _BLOCK_GRANULES])
                self._add_runs(values, lengths)

    def end(self) -> None:
        """Nothing can be read after the last granule."""
        if self._tag is not None:
            self._count(np.array([self._tag], dtype=np.uint8), np.array([self._length]))
            self.counts.last_runs += self._tag != 0
        self._tag = self._before = None

    def _add_runs(self, values: Tags, lengths: NDArray[np.intp]) -> None:
        """Count runs that follow directly; the first may go on with the last one."""
        if values[0] == self._tag:
            self._length += int(lengths[0])
            values, lengths = values[1:], lengths[1:]
        if not values.size:
            return
        self._count_next_but_one(values)
        if self._tag is not None:
            values = np.concatenate((np.array([self._tag], dtype=np.uint8), values))
            lengths = np.concatenate((np.array([self._length]), lengths))
        if values.size > 1:
            self._count(values[:-1], lengths[:-1])
            self._before = int(values[-2])
        self._tag, self._length = int(values[-1]), int(lengths[-1])

    def _count_next_but_one(self, values: Tags) -> None:
        known = [tag for tag in (self._before, self._tag) if tag is not None]
        all_values = np.concatenate((np.array(known, dtype=np.uint8), values))
        first, third = all_values[:-2], all_values[2:]
        is_tagged = first != 0
        self.counts.next_but_one += int(np.count_nonzero(is_tagged))
        self.counts.next_but_one_same += int(np.count_nonzero(is_tagged & (first == third)))

    def _count(self, values: Tags, lengths: NDArray[np.intp]) -> None:
        counts = self.counts
        counts.runs += np.bincount(values, minlength=N_TAGS)
        # Sums of weights are floats, exact up to 2^53.
        counts.granules += np.bincount(values, lengths, N_TAGS).astype(np.int64)
        tagged = lengths[values != 0]
        if tagged.size:
            exponents = np.frexp(tagged)[1] - 1
            counts.lengths += np.bincount(exponents, minlength=_N_LENGTHS)
            counts.length_granules += np.bincount(exponents, tagged, _N_LENGTHS).astype(np.int64)
            counts.longest = max(counts.longest, int(tagged.max()))
