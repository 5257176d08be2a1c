"""Where a guest has memory, from answers to one question: does anything overlap this range?

KVM does not show its memslots, but refuses a new one that overlaps another. Pure: the question is a
function. The start of each covered range is found exactly, and everything between the ranges found
is known to be free. A hole inside a range shows only in a question about that very page; such
questions are asked where memslots are likely to end: after as much memory as some mapping of the
VMM has, at powers of two, at every page of a small range and at even distances in a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from mtetool.spans import Span

# Up to this many pages, ask about each; of a larger range, about this many.
_EVERY_PAGE = 128
_SAMPLES = 48


class Answer(Enum):
    """The kernel's answer about a range."""

    TAKEN = "a memslot overlaps it"
    FREE = "none does"
    BEYOND = "none does, and it reaches beyond the guest's address space"


Ask = Callable[[int, int], Answer]


@dataclass(frozen=True, slots=True)
class Prober:
    """Finds what memslots cover. `ask` takes an address and a size, both whole pages.

    `piece_bytes` is the largest range that can be asked about. `hints` are sizes that memslots may
    have: those of the VMM's mappings.
    """

    ask: Ask
    page_bytes: int
    piece_bytes: int
    hints: Iterable[int] = ()

    def covered(self) -> list[Span]:
        """The covered ranges, in order of address.

        Adjacent memslots are merged.
        """
        found: list[Span] = []
        at = 0
        while (start := self._first_taken(at)) is not None:
            at = self._end_of(start)
            if found and found[-1].end == start:
                start = found.pop().start
            found.append(Span(start, at))
        return found

    def still(self, covered: Iterable[Span]) -> bool:
        """Whether these are still the ranges, judging by their ends and the gaps between them."""
        at = 0
        for start, end in covered:
            if not (self._taken(start, 0) and self._taken(end, -1) and self._free(at, start)):
                return False
            at = end
        return self._first_taken(at) is None

    def _free(self, at: int, end: int) -> bool:
        while at < end:
            size = min(end - at, self.piece_bytes)
            if self.ask(at, size) is Answer.TAKEN:
                return False
            at += size
        return True

    def _first_taken(self, at: int) -> int | None:
        """The first page from `at` on that is taken; None if there is none."""
        while (answer := self.ask(at, self.piece_bytes)) is not Answer.TAKEN:
            if answer is Answer.BEYOND:
                return None
            at += self.piece_bytes
        # Within the piece, the answer to "anything up to here?" only turns from no to yes.
        low, high = 0, self.piece_bytes // self.page_bytes
        while high - low > 1:
            middle = (low + high) // 2
            taken = self.ask(at, middle * self.page_bytes) is Answer.TAKEN
            low, high = (low, middle) if taken else (middle, high)
        return at + low * self.page_bytes

    def _end_of(self, start: int) -> int:
        """The end of the range that starts there, as far as the questions show."""
        end = self._fall(start, self._likely_ends())
        while True:
            shorter = self._fall(start, self._checks((end - start) // self.page_bytes))
            if shorter >= end:
                return end
            end = shorter

    def _fall(self, start: int, offsets: Iterable[int]) -> int:
        """Where memory ends, between the last taken and the first free page of `offsets`.

        If all are taken, the page after the last.
        """
        low = 0
        for high in offsets:
            if not self._taken(start, high):
                break
            low = high
        else:
            return start + (low + 1) * self.page_bytes
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._taken(start, middle) else (low, middle)
        return start + high * self.page_bytes

    def _taken(self, start: int, page: int) -> bool:
        return self.ask(start + page * self.page_bytes, self.page_bytes) is Answer.TAKEN

    def _likely_ends(self) -> list[int]:
        """Likely ends in pages; the last lies beyond any address space (2^52 bytes)."""
        hinted = {hint // self.page_bytes for hint in self.hints}
        return sorted((hinted | {1 << bit for bit in range(41)}) - {0})

    def _checks(self, n_pages: int) -> list[int]:
        step = 1 if n_pages <= _EVERY_PAGE else n_pages // _SAMPLES
        return [*range(step, n_pages - 1, step), *([n_pages - 1] if n_pages > 1 else [])]
