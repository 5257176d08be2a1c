"""Copies of tags through a VMM's transfer buffer, several of them in flight at a time.

The kernel's copies take the time, and follow each other without waiting for us: while the kernel
fills one part of the buffer, mtetool fetches, examines or fills another. One ioctl copies at most
`COPY_GRANULES`: its loop neither reschedules nor checks for signals.

For small copies the way to the VMM takes longer than the copy. They wait for each other, and go
there together as one chain of calls (`mtetool.attach.chain`).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from mtetool import uapi
from mtetool.attach import chain_room
from mtetool.attach.session import Session
from mtetool.errors import MtetoolError
from mtetool.guest import Guest

COPY_GRANULES = Guest.max_copy_granules
"""The most that one ioctl copies, and the size of a part of the buffer: one byte per granule."""

DEPTH = 2
"""Two copies, each with its read-back: the next is in flight while one is examined."""

SMALL_GRANULES = Guest.small_granules
"""Copies up to this size wait for each other."""

BURST = chain_room.MOST_CALLS // 2
"""So many copies are made together. A write counts twice: it is read back."""

_N_PARTS = 2 * DEPTH

BUFFER_BYTES = _N_PARTS * COPY_GRANULES

UNREAD = 0xFF
"""What no tag is: bytes that are still this after a chain were not copied."""


@dataclass(slots=True, eq=False)
class Copy:
    """A copy that was begun; `Transfer` makes it. `tags` are the caller's, which a read fills."""

    ipa: int
    tags: memoryview
    flags: int
    answer: int | Exception | None = None

    @property
    def reads(self) -> bool:
        """Whether it copies from the guest."""
        return self.flags == uapi.KVM_ARM_TAGS_FROM_GUEST

    @property
    def size_bytes(self) -> int:
        """Bytes of guest memory."""
        return len(self.tags) * uapi.GRANULE_BYTES


@dataclass(slots=True, eq=False)
class _Together:
    """Copies that are made in one go: a large one by itself, or a chain of small ones.

    Their tags lie in one part of the buffer, `part`, in the order in which they were begun, each
    write followed by room to read it back.
    """

    part: int
    copies: list[Copy] = field(default_factory=list)
    room: int = 0
    n_calls: int = 0
    ioctl: Future[int] | None = None
    chain: Future[bool] | None = None
    """Either of them once the copies were sent; none for copies that are yet to be made alone."""

    def takes(self, copy: Copy) -> bool:
        """Whether one more fits in."""
        times = 1 if copy.reads else 2
        small = not self.copies or len(self.copies[0].tags) <= SMALL_GRANULES >= len(copy.tags)
        has_room = self.room + times * len(copy.tags) <= COPY_GRANULES
        return small and (not self.copies or has_room) and self.n_calls + times <= 2 * BURST

    def add(self, copy: Copy) -> None:
        """Add a copy that it takes."""
        times = 1 if copy.reads else 2
        self.copies.append(copy)
        self.room += times * len(copy.tags)
        self.n_calls += times


class Transfer:
    """The buffer of one session, used for the VM behind `fd`.

    It returns the kernel's answers unchanged: bytes of guest memory, or -errno.
    """

    def __init__(self, session: Session, fd: int) -> None:
        self.session = session
        self._fd = fd
        self._under_way: deque[_Together] = deque()
        self._waiting: _Together | None = None
        """Small copies that were not sent yet, the last of those under way."""
        self._n_begun = 0

    def begin(self, ipa: int, tags: memoryview, flags: int) -> Copy:
        """Begin to copy at most `COPY_GRANULES` from or to guest memory, by KVM's `flags`."""
        copy = Copy(ipa, tags, flags)
        if self._waiting is None or not self._waiting.takes(copy):
            self.send()
            if len(self._under_way) == _N_PARTS:
                self._settle_first()
            self._waiting = _Together(self._n_begun % _N_PARTS * COPY_GRANULES)
            self._n_begun += 1
            self._under_way.append(self._waiting)
        self._waiting.add(copy)
        if len(tags) > SMALL_GRANULES:
            self.send()
        return copy

    def finish(self, copy: Copy) -> int:
        """Wait for a copy and those begun before it; return its answer. Raises GuestError."""
        while copy.answer is None:
            self._settle_first()
        if isinstance(copy.answer, Exception):
            raise copy.answer
        return copy.answer

    def drain(self) -> None:
        """Wait for all copies; their callers get the answers later."""
        while self._under_way:
            self._settle_first()

    def send(self) -> None:
        """Let the kernel begin with all copies that were begun, before whatever comes next."""
        together, self._waiting = self._waiting, None
        if together is None:
            return
        try:
            if len(together.copies) == 1:
                together.ioctl = self._begin_alone(together.copies[0], together.part)
            else:
                self._begin_chain(together)
        except (MtetoolError, OSError) as error:
            _fail(together.copies, error)

    def nothing(self, flags: int = uapi.KVM_ARM_TAGS_FROM_GUEST) -> int:
        """Copy nothing, which shows whether a copy would pass every check.

        A copy to the guest is also refused while the VM logs dirty pages.
        """
        self.send()
        return self.session.finish(self._ioctl(0, 0, 0, flags))

    def chain(self, arguments: bytes) -> Future[bool]:
        """Begin a chain of copies; see `Session.begin_chain` and `argument`."""
        return self.session.begin_chain(self._fd, uapi.KVM_ARM_MTE_COPY_TAGS, arguments)

    def argument(self, ipa: int, n_granules: int, at: int, flags: int) -> bytes:
        """The ioctl's argument for a copy to or from `at` in the buffer."""
        address = self.session.buffer_address + at
        return uapi.copy_mte_tags(ipa, n_granules * uapi.GRANULE_BYTES, address, flags)

    def _settle_first(self) -> None:
        # It stays the first until it has returned: a signal of ours may end the wait.
        together = self._under_way[0]
        if together is self._waiting:
            self.send()
        try:
            if together.chain is not None:
                self._settle_chain(together, together.chain)
            self._make_alone(together)
        except (MtetoolError, OSError) as error:
            _fail(together.copies, error)
        self._under_way.popleft()

    # --- one copy -------------------------------------------------------------------------

    def _make_alone(self, together: _Together) -> None:
        for copy in together.copies:
            if copy.answer is None:
                ioctl = together.ioctl or self._begin_alone(copy, together.part)
                together.ioctl = None
                copy.answer = self._settle_alone(copy, together.part, ioctl)

    def _begin_alone(self, copy: Copy, part: int) -> Future[int]:
        if not copy.reads:
            self.session.write_buffer(copy.tags, part)
        return self._ioctl(copy.ipa, len(copy.tags), part, copy.flags)

    def _settle_alone(self, copy: Copy, part: int, ioctl: Future[int]) -> int:
        answer = self.session.finish(ioctl)
        if copy.reads and answer > 0:
            n_granules = min(answer // uapi.GRANULE_BYTES, len(copy.tags))
            self.session.read_buffer(copy.tags[:n_granules], part)
        return answer

    def _ioctl(self, ipa: int, n_granules: int, at: int, flags: int) -> Future[int]:
        argument = self.argument(ipa, n_granules, at, flags)
        return self.session.begin_ioctl(self._fd, uapi.KVM_ARM_MTE_COPY_TAGS, argument)

    # --- a chain --------------------------------------------------------------------------

    def _begin_chain(self, together: _Together) -> None:
        staged = bytearray(bytes([UNREAD])) * together.room
        arguments, at = [], 0
        for copy in together.copies:
            n_granules = len(copy.tags)
            calls = [copy.flags]
            if not copy.reads:
                staged[at : at + n_granules] = copy.tags
                # What a write in a chain returned is not known: it is read back.
                calls.append(uapi.KVM_ARM_TAGS_FROM_GUEST)
            for flags in calls:
                arguments.append(self.argument(copy.ipa, n_granules, together.part + at, flags))
                at += n_granules
        self.session.write_buffer(memoryview(staged), together.part)
        together.chain = self.chain(b"".join(arguments))

    def _settle_chain(self, together: _Together, chain: Future[bool]) -> None:
        if self.session.finish(chain):
            found = memoryview(bytearray(together.room))
            self.session.read_buffer(found, together.part)
            at = 0
            for copy in together.copies:
                n_granules = len(copy.tags)
                if not copy.reads:
                    at += n_granules
                is_complete = _take(copy, found[at : at + n_granules])
                at += n_granules
                if is_complete:
                    copy.answer = copy.size_bytes
                elif not copy.reads:
                    break  # in their order: all that follow are made again after it
        together.chain = None


def _take(copy: Copy, found: memoryview) -> bool:
    """Take what a chain left of a copy; return whether the copy was completed."""
    if not copy.reads:
        return found == copy.tags
    if UNREAD in bytes(found):
        return False
    copy.tags[:] = found
    return True


def _fail(copies: list[Copy], error: Exception) -> None:
    for copy in copies:
        if copy.answer is None:
            copy.answer = error
