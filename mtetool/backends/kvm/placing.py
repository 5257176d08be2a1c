"""Where guest memory is in the VMM's own, from the kernel's answers to guesses. Pure.

The question is a change of a memslot that the kernel refuses for one of two reasons: size, address
or read-only flag are not the slot's own; or all are, and the slot would be moved onto another one
(virt/kvm/kvm_main.c, kvm_set_memory_region). Nothing is ever moved, because a question is only
asked where another slot is in the way, whichever slot it is about:

- A slot of that size can only be in a range of memory at least as large (a "host"), so any slot in
  a smaller range is another one. Two of those are required (`_BLOCKERS`): for a move, the VMM would
  have to remove both between the check of their pages and the very next question, and the guess
  would have to be right.
- If the largest range is known to be one slot, that slot is enough for the other ids: a VMM does
  not remove its guest's main memory.
- A question never begins where the slot in question begins, so it never asks to change the slot's
  flags or anything else of it: the question overlaps another range, and so contains a free page or
  one of another slot, which the slot itself does not.

No other slot of a host is ever in the way. So a slot that was moved all the same came from the one
place in the hosts that is now empty: `Guess` carries what is needed to put it back.

Addresses given by QEMU's monitor or the user are guesses like any others, tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import attrgetter

from mtetool.spans import Place, Span

_BLOCKERS = 2
# Smaller memory is quick to read, and too small to be guessed among a VMM's many mappings.
SMALLEST_BYTES = 1 << 20
# A VMM's own allocator aligns memory to the huge pages that it hopes to get.
_ALIGNMENTS = (1 << 21, 1 << 30)
_MOST_TOGETHER = 8
_SIZE: Callable[[Span], int] = attrgetter("size_bytes")


@dataclass(frozen=True, slots=True)
class Guess:
    """What a memslot may be, and the address that the question is about; sizes in bytes.

    `blockers` are pages there that belong to other memslots, `hosts` the ranges in which the slot
    may be, and `told` its own guest address, if one was given.
    """

    slot_id: int
    ipa: int
    size_bytes: int
    address: int
    readonly: bool
    blockers: tuple[int, ...] = ()
    hosts: tuple[Span, ...] = ()
    told: int | None = None


@dataclass
class Placer:
    """Guesses until everything is known or `most` questions have been asked.

    `covered` are all ranges of guest memory; `ids` the slots in use (all of them, or the first
    ones); `memory` the ranges of the VMM's own memory that may be a guest's. `ask` says whether a
    guess is right. If places were `told`, it ends as soon as all of those are proven.
    """

    covered: Sequence[Span]
    ids: Sequence[int]
    memory: Sequence[Span]
    page_bytes: int
    ask: Callable[[Guess], bool]
    most: int
    told: Sequence[Place] = ()
    asked: int = 0
    right: list[Guess] = field(default_factory=list)
    _tried: set[tuple[int, int, int, bool]] = field(default_factory=set)

    def places(self) -> list[Place]:
        """The places that are proven; see `settled`."""
        while (
            not self.all_told_proven()
            and self.asked < self.most
            and (found := self._next_right()) is not None
        ):
            self.right.append(found)
        return settled(self.covered, self.right)

    def all_told_proven(self) -> bool:
        """Whether places were told, and all of those worth asking about are proven."""
        worth_it = {place for place in self.told if place.size_bytes >= SMALLEST_BYTES}
        return bool(self.told) and worth_it <= set(settled(self.covered, self.right))

    def _next_right(self) -> Guess | None:
        known = {guess.slot_id for guess in self.right}
        for guess in self._guesses([slot for slot in self.ids if slot not in known]):
            # The answer is the same at every address where it is asked.
            key = (guess.slot_id, guess.size_bytes, guess.address, guess.readonly)
            if key in self._tried:
                continue
            if self.asked >= self.most:
                return None
            self.asked += 1
            self._tried.add(key)
            if self.ask(guess):
                return guess
        return None

    def _guesses(self, ids: Sequence[int]) -> Iterator[Guess]:
        known = {(guess.size_bytes, guess.address) for guess in self.right}
        told = sorted(self.told, key=lambda place: -place.size_bytes)
        likely = [
            (size, address, ipa)
            for ipa, size, address in told
            if size >= SMALLEST_BYTES and (size, address) not in known
        ]
        for size, address, ipa in (*likely, *((*each, None) for each in self._candidates())):
            hosts = tuple(self._hosts(size))
            where = self._refused_at(size, hosts) if hosts else None
            if where is not None:
                for readonly, slot_id in product((False, True), ids):
                    yield Guess(slot_id, where[0], size, address, readonly, where[1], hosts, ipa)

    def _solid(self) -> int | None:
        """Where the largest range begins, if it is known to be one slot."""
        start, end = max(self.covered, key=_SIZE)
        alone = sum(each.size_bytes >= end - start for each in self.covered) == 1
        whole = any(guess.size_bytes == end - start for guess in self.right)
        return start if alone and whole else None

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """Pairs (size, address), large sizes first and the likely addresses of each size first."""
        pieces = list(self._pieces())
        ranges = {each.size_bytes for each in self.covered}
        sizes = ranges | {piece.size_bytes for piece in pieces}
        for size in sorted(sizes, reverse=True):
            if SMALLEST_BYTES <= size <= max(ranges):
                yield from ((size, start) for start, end in pieces if end - start == size)
                if size in ranges:
                    yield from ((size, address) for address in inside(pieces, size))

    def _pieces(self) -> Iterator[Span]:
        """The VMM's memory without the parts that are known already."""
        taken = sorted((guess.address, guess.address + guess.size_bytes) for guess in self.right)
        for start, end in self.memory:
            for first, behind in taken:
                if start < behind and first < end:
                    if start < first:
                        yield Span(start, first)
                    start = behind
            if start < end:
                yield Span(start, end)

    def _hosts(self, size: int) -> list[Span]:
        """The ranges in which an unknown slot of that size can be."""
        solid = self._solid()
        return [each for each in self.covered if each.size_bytes >= size and each.start != solid]

    def _refused_at(self, size: int, hosts: Sequence[Span]) -> tuple[int, tuple[int, ...]] | None:
        """Where to ask about a slot of that size, and pages that other slots surely have there.

        None if there are not enough other slots in the way anywhere.
        """
        page = self.page_bytes
        if (solid := self._solid()) is not None:
            return solid, (solid,)
        starts = [end - page for _, end in self.covered]
        starts += [start + page - size for start, _ in self.covered]
        starts += [0]
        found = [
            (self._overlapped(at, size), at, blockers)
            for at in starts
            if at >= 0 and len(blockers := self._blockers(at, size, hosts)) >= _BLOCKERS
        ]
        if not found:
            return None
        _, at, blockers = max(found)
        return at, blockers

    def _blockers(self, at: int, size: int, hosts: Sequence[Span]) -> tuple[int, ...]:
        """Pages of different slots in the way there, none of them of a slot of that size."""
        page = self.page_bytes
        there = [each for each in self.covered if each.start < at + size and at < each.end]
        if any(each in hosts for each in there) and [each.size_bytes for each in hosts] != [size]:
            return ()
        others = sorted((each for each in self.covered if each not in hosts), key=_SIZE)
        there = [each for each in others if each in there]
        # A range smaller than the question has its first or last page in it.
        pages = [start if at <= start else end - page for start, end in there]
        if len(pages) >= _BLOCKERS:
            return tuple(pages[-_BLOCKERS:])
        # If the only host is filled, the ids show how many slots are in the only other range.
        if (
            len(self.ids) > _BLOCKERS
            and [each.size_bytes for each in hosts] == [size]
            and len(others) == len(there) == 1
            and at <= there[0].start
            and there[0].end <= at + size
        ):
            return there[0].start, there[0].end - page
        return ()

    def _overlapped(self, at: int, size: int) -> int:
        return sum(max(0, min(end, at + size) - max(start, at)) for start, end in self.covered)


def settled(covered: Iterable[Span], right: Sequence[Guess]) -> list[Place]:
    """Where memory is that provably consists of known slots only.

    The kernel confirms what a slot is, not where. But slots that fit into no smaller range must be
    in the largest ranges, and if they fill those, nothing else is in them. A slot that could be in
    several places is returned with each of them, so one of the places returned for an address is
    the true one.
    """
    found: list[Place] = []
    left = sorted(covered, key=_SIZE, reverse=True)
    slots = list(right)
    n = 1
    while n <= len(left):
        next_size = left[n].size_bytes if n < len(left) else 0
        fitting = [slot for slot in slots if slot.size_bytes > next_size]
        if len(fitting) > _MOST_TOGETHER:
            break
        if sum(slot.size_bytes for slot in fitting) == sum(map(_SIZE, left[:n])):
            found += _everywhere(left[:n], fitting)
            slots = [slot for slot in slots if slot not in fitting]
            left, n = left[n:], 0
        n += 1
    return sorted(found)


def _everywhere(ranges: Sequence[Span], slots: Sequence[Guess]) -> Iterator[Place]:
    """All places that the slots can have if together they fill the ranges."""
    for slot in slots:
        offsets = {0}
        for other in slots:
            if other is not slot:
                offsets |= {offset + other.size_bytes for offset in offsets}
        for start, end in ranges:
            for offset in offsets:
                if start + offset + slot.size_bytes <= end:
                    yield Place(start + offset, slot.size_bytes, slot.address)


def inside(pieces: Sequence[Span], size: int) -> Iterator[int]:
    """Likely addresses of `size` bytes of memory within larger pieces."""
    for start, end in pieces:
        if end - start > size:
            starts = [start, end - size, *(-(-start // each) * each for each in _ALIGNMENTS)]
            yield from (at for at in dict.fromkeys(starts) if at + size <= end)
