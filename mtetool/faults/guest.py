"""Any guest, with faults on request: for rehearsing what a guest does once in a thousand days.

    from mtetool.faults.guest import Fail, Fault, FaultyGuest

    with FaultyGuest(guest, [Fault(Fail(errno.EFAULT), on="write", after=100, times=1)]) as faulty:
        faulty.write_tags(ipa, tags)

Answers are cut as the kernel cuts them: a fault in the middle of a copy leaves the pages completed
before it, and its errno is returned only if there are none.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Protocol

from mtetool.buffers import as_bytes
from mtetool.errors import GuestLostError, MtetoolError, errno_name
from mtetool.faults.model import Delay, Direction, Fail, Fault, Faults, Rate, Vanish
from mtetool.faults.plan import Plan, Stretch
from mtetool.guest import Extent, Guest, GuestInfo
from mtetool.uapi import GRANULE_BYTES, is_copy_range

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

__all__ = ["Delay", "Fail", "Fault", "Faults", "FaultyGuest", "Kept", "Rate", "Vanish"]


class Kept(Protocol):
    """Where the faults of a guest are kept, with what they have seen."""

    def held(self) -> AbstractContextManager[Faults]:
        """The faults, locked for this caller until the end of the `with`, which saves changes."""
        ...

    def close(self) -> None:
        """Close it. May be called twice."""
        ...


class _InMemory:
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    @contextmanager
    def held(self) -> Iterator[Faults]:
        yield self._faults

    def close(self) -> None:
        pass


# Errnos that the kernel returns for a whole VM, whichever page is written, even for none.
_OF_THE_WHOLE_VM = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EIO)


def _refuses_all_writes(faults: Faults) -> int | None:
    """The errno that every write gets for now; asking does not count as a copy."""
    for index, fault in enumerate(faults.ordered):
        if fault.on == "read" or fault.at or fault.every != 1 or fault.chance < 1.0:
            continue
        due = faults.counted[index].pages >= fault.after and not faults.is_spent(index)
        if due and isinstance(fault.effect, Fail) and fault.effect.errno in _OF_THE_WHOLE_VM:
            return fault.effect.errno
    return None


class FaultyGuest(Guest):
    """A `Guest` in front of another, which it closes; `faults` fire in copies of tags.

    EIO and `Vanish` are reported as `kvm:` guests report them, as GuestLostError: EIO for as long
    as the fault fires, while a guest that vanished is gone for good. Counters live as long as this
    object, or in `kept`, which then has the faults, too. Slow copies call `sleep`.
    """

    def __init__(
        self,
        guest: Guest,
        faults: Iterable[Fault] = (),
        *,
        kept: Kept | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._guest = guest
        self.pid = guest.pid
        self.page_size_bytes = guest.page_size_bytes
        self.max_copy_granules = guest.max_copy_granules
        self.makes_pages = guest.makes_pages
        self._kept: Kept = kept or _InMemory(Faults.of(faults))
        self._sleep = sleep
        self._closed = False

    def faults(self) -> Faults:
        """The faults, and what they have seen so far."""
        with self._kept.held() as faults:
            return deepcopy(faults)

    def info(self) -> GuestInfo:
        """See `Guest.info`. Raises GuestLostError once it has vanished."""
        self._check_there()
        return self._guest.info()

    def prepare(self) -> None:
        """See `Guest.prepare`."""
        self._guest.prepare()

    def paused(self) -> bool | None:
        """See `Guest.paused`. Raises GuestLostError once it has vanished."""
        self._check_there()
        return self._guest.paused()

    def freeze(self) -> None:
        """See `Guest.freeze`. Raises GuestLostError once it has vanished."""
        self._check_there()
        self._guest.freeze()

    def thaw(self) -> float:
        """See `Guest.thaw`; also once it has vanished: nothing is left to resume."""
        return self._guest.thaw()

    def enable_mte(self) -> bool:
        """See `Guest.enable_mte`. Raises GuestLostError once it has vanished."""
        self._check_there()
        return self._guest.enable_mte()

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        """See `Guest.read_tags`; with the faults for reads."""
        return self._copied("read", self._guest.read_tags, ipa, as_bytes(out))

    def would_make(self, extents: Sequence[Extent]) -> int:
        """See `Guest.would_make`."""
        return self._guest.would_make(extents)

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """See `Guest.write_tags`; with the faults for writes."""
        if not len(as_bytes(tags)):
            self._check_there()
            with self._kept.held() as faults:
                number = _refuses_all_writes(faults)
            done = self._guest.write_tags(ipa, tags)
            return done if number is None else self._answer(ipa, 0, Fault(Fail(number)))
        return self._copied("write", self._guest.write_tags, ipa, as_bytes(tags))

    def _copied(
        self,
        direction: Direction,
        copy: Callable[[int, memoryview], int],
        ipa: int,
        tags: memoryview,
    ) -> int:
        page_bytes, length_bytes = self.page_size_bytes, len(tags) * GRANULE_BYTES
        copies = length_bytes > 0 and is_copy_range(ipa, length_bytes, page_bytes)
        if self._closed or not copies:
            self._check_there()
            return copy(ipa, tags)  # the guest's own answer comes first, as the kernel's checks do
        with self._kept.held() as faults:
            if faults.vanished:
                raise self._gone()
            stretch = Stretch(direction, ipa, length_bytes // page_bytes, page_bytes)
            plan = Plan(faults, stretch)
            # A copy of nothing still goes through every check.
            part = tags[: plan.n_pages * page_bytes // GRANULE_BYTES]
            done = copy(ipa, part)
            seconds = plan.settle(done // page_bytes)
            stopped = plan.stopped_by if done == len(part) * GRANULE_BYTES else None
        if seconds:
            self._sleep(seconds)
        return self._answer(ipa, done, stopped)

    def _answer(self, ipa: int, done: int, stopped: Fault | None) -> int:
        if stopped is None:
            return done
        if isinstance(stopped.effect, Vanish):
            raise self._gone()
        if done:
            return done
        assert isinstance(stopped.effect, Fail)
        number = stopped.effect.errno
        if number == errno.EIO:
            raise GuestLostError(f"the VM behind {self._name()} is dead (EIO, an injected fault)")
        raise OSError(
            number,
            f"copying tags at {ipa:#x}: {errno_name(number)} (an injected fault)",
        )

    def _check_there(self) -> None:
        if self._closed:
            return  # the guest itself reports that
        with self._kept.held() as faults:
            if faults.vanished:
                raise self._gone()

    def _gone(self) -> GuestLostError:
        return GuestLostError(
            f"{self._name()} vanished while mtetool was working on it (an injected fault)",
            hint="bring an emulated guest back: mtetool emu fault PATH --clear",
        )

    def _name(self) -> str:
        try:
            return self._guest.info().source
        except MtetoolError:
            return "the guest"

    def close(self) -> None:
        """See `Guest.close`: closes the guest behind it too."""
        self._closed = True
        self._kept.close()
        self._guest.close()
