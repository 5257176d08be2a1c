"""Faults ordered for a guest: what happens, and when. No tags, no I/O.

A fault watches the pages of copies, one after the other. It *fires* at a page where all its
conditions hold; what happens then is its effect. `Fault.__str__` returns the form of the command
line, `EFAULT,on=write,at=0x40010000:0x1000,times=1`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from mtetool.errors import errno_name

Direction = Literal["read", "write"]

ERRNO_MAX = 4095
"""The largest errno that a system call can return (include/linux/err.h)."""

_NUMBER_END = 1 << 64
_NANOSECONDS = 1_000_000_000
_UNITS = (("s", _NANOSECONDS), ("ms", 1_000_000), ("us", 1_000), ("ns", 1))
_SUFFIXES = (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))


@dataclass(frozen=True, slots=True)
class Fail:
    """The copy stops before the page: an errno if nothing was copied, else a short copy."""

    errno: int

    def __post_init__(self) -> None:
        _check("an errno", self.errno, 1, ERRNO_MAX)

    def __str__(self) -> str:
        return errno_name(self.errno)


@dataclass(frozen=True, slots=True)
class Vanish:
    """The guest ends, and does not come back."""

    def __str__(self) -> str:
        return "vanish"


@dataclass(frozen=True, slots=True)
class Delay:
    """Each page takes this much longer."""

    nanoseconds: int

    def __post_init__(self) -> None:
        _check("a delay", self.nanoseconds, 1, _NUMBER_END - 1)

    def __str__(self) -> str:
        unit, size = next(pair for pair in _UNITS if self.nanoseconds % pair[1] == 0)
        return f"slow={self.nanoseconds // size}{unit}"

    def seconds_for(self, size_bytes: int, page_size_bytes: int) -> float:
        """The delay for this many bytes of guest memory."""
        return size_bytes / page_size_bytes * self.nanoseconds / _NANOSECONDS


@dataclass(frozen=True, slots=True)
class Rate:
    """At most this many bytes of guest memory per second."""

    bytes_per_second: int

    def __post_init__(self) -> None:
        _check("a rate", self.bytes_per_second, 1, _NUMBER_END - 1)

    def __str__(self) -> str:
        rate = self.bytes_per_second
        letter, size = next((pair for pair in _SUFFIXES if rate % pair[1] == 0), ("", 1))
        return f"slow={rate // size}{letter}/s"

    def seconds_for(self, size_bytes: int, page_size_bytes: int) -> float:
        """The time that this many bytes of guest memory take."""
        return size_bytes / self.bytes_per_second


Effect = Fail | Vanish | Delay | Rate


@dataclass(frozen=True, slots=True)
class Fault:
    """An effect and its conditions, all of which must hold.

    `on` None: copies in both directions. `at`: pages that this range (address, size in bytes)
    touches. `after`: this many of the pages that `on` and `at` name pass first. `every` n: only at
    the first page of each n-th copy that begins at such a page. `chance`: at each page with this
    probability, from a generator seeded with `seed`. `times`: at most this often.

    Raises ValueError for conditions that make no sense.
    """

    effect: Effect
    on: Direction | None = None
    at: tuple[int, int] | None = None
    after: int = 0
    every: int = 1
    chance: float = 1.0
    seed: int = 0
    times: int | None = None

    def __post_init__(self) -> None:
        if self.on not in (None, "read", "write"):
            raise ValueError(f"on={self.on}: the directions are read and write")
        if self.at is not None:
            _check("the address of 'at'", self.at[0], 0, _NUMBER_END - 1)
            _check("the size of 'at'", self.at[1], 1, _NUMBER_END - self.at[0])
        _check("'after'", self.after, 0, _NUMBER_END - 1)
        _check("'every'", self.every, 1, _NUMBER_END - 1)
        _check("'seed'", self.seed, 0, _NUMBER_END - 1)
        if not 0.0 < self.chance <= 1.0:
            raise ValueError(f"chance={self.chance}: must be above 0 and at most 1")
        if self.seed and self.chance == 1.0:
            raise ValueError("a seed without a chance: seed=N needs chance=P")
        if self.times is not None:
            _check("'times'", self.times, 1, _NUMBER_END - 1)
            if isinstance(self.effect, Vanish):
                raise ValueError("a guest vanishes once: vanish takes no times=N")

    def __str__(self) -> str:
        words = [str(self.effect)]
        if self.on is not None:
            words.append(f"on={self.on}")
        if self.at is not None:
            words.append(f"at={self.at[0]:#x}:{self.at[1]:#x}")
        if self.after:
            words.append(f"after={self.after}")
        if self.every != 1:
            words.append(f"every={self.every}")
        if self.chance != 1.0:
            # Not repr, which writes small ones as 1e-05.
            words.append(f"chance={_plain(self.chance)}")
        if self.seed:
            words.append(f"seed={self.seed}")
        if self.times is not None:
            words.append(f"times={self.times}")
        return ",".join(words)


@dataclass(slots=True)
class Counted:
    """What one fault has seen: copies begun and pages passed that `on` and `at` name.

    `fired` counts errnos returned, pages delayed, or the one time that the guest vanished.
    """

    copies: int = 0
    pages: int = 0
    fired: int = 0


@dataclass(slots=True)
class Faults:
    """All faults of a guest, with what they have seen; `vanished` once one has ended it."""

    ordered: tuple[Fault, ...] = ()
    counted: list[Counted] = field(default_factory=list)
    vanished: bool = False

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> Faults:
        """Faults that have seen nothing yet."""
        ordered = tuple(faults)
        return cls(ordered, [Counted() for _ in ordered])

    def is_spent(self, index: int) -> bool:
        """Whether a fault has fired as often as it may."""
        times = self.ordered[index].times
        return times is not None and self.counted[index].fired >= times


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, not {low} to {high}")


def _plain(number: float) -> str:
    from decimal import Decimal

    return f"{Decimal(repr(number)):f}"
