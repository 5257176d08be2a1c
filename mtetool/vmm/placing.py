"""Where in a VMM's own memory its guest's is, from the kernel's answers to guesses. Pure.

The question is a change of a memslot that the kernel refuses in one of two ways: because size,
address or the read-only flag are not the slot's own, or because all are, and the slot would be
moved onto another one (virt/kvm/kvm_main.c, kvm_set_memory_region). Nothing is ever moved, as a
question is only asked where another slot is in the way whichever slot it is about:

- A slot of that size can only be in a range of memory that is as large (a "host"). So of the ranges
  that the question overlaps, each smaller one has another slot, and of the larger ones all but one.
  Two others are demanded (`_OTHERS`): the VMM would have to remove both, between the look
  at its layout and this very question, and the guess be right.
- Where the largest range is known to be one slot, that slot is enough for the other ids: a VMM does
  not remove its guest's main memory.
- Where a question begins is never where the slot asked for begins, so that neither its flags nor
  anything else of it is asked to change: the question overlaps another range, and so has a
  free page or a foreign one in it, which a slot does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

_OTHERS = 2
# What is smaller is soon read, and too small to be guessed among a VMM's many mappings.
SMALLEST_BYTES = 1 << 20
# A VMM's own allocator aligns memory to the huge pages that it hopes for.
_ALIGNMENTS = (1 << 21, 1 << 30)
_MOST_TOGETHER = 8

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Guess:
    """What a memslot may be, and the address for which that is asked; sizes in bytes."""

    slot_id: int
    ipa: int
    size_bytes: int
    address: int
    readonly: bool


@dataclass
class Placer:
    """Guesses until all is known or `most` questions are asked.

    `covered` are the ranges of guest memory, all that there is; `ids` the slots in use; `memory`
    the ranges of the VMM's own memory that may be a guest's. `ask` says whether a guess is right.
    """

    covered: Sequence[Range]
    ids: Sequence[int]
    memory: Sequence[Range]
    page_bytes: int
    ask: Callable[[Guess], bool]
    most: int
    asked: int = 0
    right: list[Guess] = field(default_factory=list)
    _tried: set[Guess] = field(default_factory=set)

    def places(self) -> list[tuple[int, int, int]]:
        """(ipa, size, address) of memory whose place is proven; see `settled`."""
        while self.asked < self.most and (found := self._next_right()):
            self.right.append(found)
        return settled(self.covered, self.right)

    def _next_right(self) -> Guess | None:
        known = {guess.slot_id for guess in self.right}
        for guess in self._guesses([slot for slot in self.ids if slot not in known]):
            # Wherever it is asked for, the answer is the same.
            if (key := replace(guess, ipa=0)) in self._tried:
                continue
            if self.asked >= self.most:
                return None
            self.asked += 1
            self._tried.add(key)
            if self.ask(guess):
                return guess
        return None

    def _guesses(self, ids: Sequence[int]) -> Iterator[Guess]:
        solid = self._solid()
        for size, address in self._candidates():
            ipa = self._refused_at(size) if solid is None else solid
            if ipa is not None:
                for readonly, slot_id in product((False, True), ids):
                    yield Guess(slot_id, ipa, size, address, readonly)

    def _solid(self) -> int | None:
        """Where the largest range begins, if that is one slot and known."""
        start, end = max(self.covered, key=_size)
        alone = sum(_size(each) >= end - start for each in self.covered) == 1
        whole = any(guess.size_bytes == end - start for guess in self.right)
        return start if alone and whole else None

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """(size, address), the likely ones of each size first, large ones first."""
        pieces = list(self._pieces())
        ranges = {_size(each) for each in self.covered}
        sizes = ranges | {_size(piece) for piece in pieces}
        for size in sorted(sizes, reverse=True):
            if SMALLEST_BYTES <= size <= max(ranges):
                yield from ((size, start) for start, end in pieces if end - start == size)
                if size in ranges:
                    yield from ((size, address) for address in _inside(pieces, size))

    def _pieces(self) -> Iterator[Range]:
        """The VMM's memory without what is known already."""
        taken = sorted((guess.address, guess.address + guess.size_bytes) for guess in self.right)
        for start, end in self.memory:
            for first, behind in taken:
                if start < behind and first < end:
                    if start < first:
                        yield start, first
                    start = behind
            if start < end:
                yield start, end

    def _refused_at(self, size: int) -> int | None:
        """Where to ask for a slot of that size; None: nowhere are enough others in the way."""
        page = self.page_bytes
        starts = [end - page for _, end in self.covered]
        starts += [start + page - size for start, _ in self.covered]
        starts += [0]
        best = max(
            (self._others(at, size), self._overlapped(at, size), at) for at in starts if at >= 0
        )
        return best[2] if best[0] >= _OTHERS else None

    def _others(self, at: int, size: int) -> int:
        """How many slots other than one of that size are surely in the way there."""
        hosts = [each for each in self.covered if _size(each) >= size]
        there = [each for each in self.covered if each[0] < at + size and at < each[1]]
        large = sum(each in hosts for each in there)
        others = len(there) - large + max(large - 1, 0)
        # Where all but the slot itself is in the way, ids tell how many that is.
        rest = [each for each in self.covered if each not in hosts]
        if [_size(each) for each in hosts] == [size] and all(
            at <= start and end <= at + size for start, end in rest
        ):
            others = max(others, len(self.ids) - 1)
        return others

    def _overlapped(self, at: int, size: int) -> int:
        return sum(max(0, min(end, at + size) - max(start, at)) for start, end in self.covered)


def settled(covered: Iterable[Range], right: Sequence[Guess]) -> list[tuple[int, int, int]]:
    """(ipa, size, address) of memory that is proven to be nothing but known slots.

    The kernel tells what a slot is and not where. But the largest ranges can only be made of
    slots that fit into no other one, and are, where these fill them. What could be in several
    places comes with each of them, so that some of the memory told for an address is its own.
    """
    found: list[tuple[int, int, int]] = []
    left = sorted(covered, key=_size, reverse=True)
    slots = list(right)
    n = 1
    while n <= len(left):
        next_size = _size(left[n]) if n < len(left) else 0
        fitting = [slot for slot in slots if slot.size_bytes > next_size]
        if len(fitting) > _MOST_TOGETHER:
            break
        if sum(slot.size_bytes for slot in fitting) == sum(map(_size, left[:n])):
            found += _everywhere(left[:n], fitting)
            slots = [slot for slot in slots if slot not in fitting]
            left, n = left[n:], 0
        n += 1
    return sorted(found)


def _everywhere(ranges: Sequence[Range], slots: Sequence[Guess]) -> Iterator[tuple[int, int, int]]:
    """All places that the slots can have where together they fill the ranges."""
    for slot in slots:
        offsets = {0}
        for other in slots:
            if other is not slot:
                offsets |= {offset + other.size_bytes for offset in offsets}
        for start, end in ranges:
            for offset in offsets:
                if start + offset + slot.size_bytes <= end:
                    yield start + offset, slot.size_bytes, slot.address


def _inside(pieces: Sequence[Range], size: int) -> Iterator[int]:
    """Likely addresses of so much memory within larger pieces."""
    for start, end in pieces:
        if end - start > size:
            starts = [start, end - size, *(-(-start // each) * each for each in _ALIGNMENTS)]
            yield from (at for at in dict.fromkeys(starts) if at + size <= end)


def _size(each: Range) -> int:
    return each[1] - each[0]
