"""Copies of tags through a VMM's transfer buffer, several of them in flight at a time.

The kernel's copies take the time, and follow each other without waiting for us: while the kernel
fills one part of the buffer, mtetool fetches, examines or fills another. One ioctl copies at most
`COPY_GRANULES`: its loop neither reschedules nor checks for signals.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from mtetool import uapi
from mtetool.attach.session import Session
from mtetool.errors import MtetoolError
from mtetool.guest import Guest

COPY_GRANULES = Guest.max_copy_granules
"""The most that one ioctl copies, and the size of a part of the buffer: one byte per granule."""

DEPTH = 2
"""Two copies, each with its read-back: the next is in flight while one is examined."""

_N_PARTS = 2 * DEPTH

BUFFER_BYTES = _N_PARTS * COPY_GRANULES


@dataclass(slots=True, eq=False)
class Copy:
    """A copy in flight, in a part of the buffer; `Transfer` makes it.

    `tags` are the caller's, which a read fills, and `begun` is the ioctl.
    """

    tags: memoryview
    part: int
    reads: bool
    begun: Future[int]
    answer: int | Exception | None = None


class Transfer:
    """The buffer of one session, used for the VM behind `fd`.

    It returns the kernel's answers unchanged: bytes of guest memory, or -errno.
    """

    def __init__(self, session: Session, fd: int) -> None:
        self._session = session
        self._fd = fd
        self._under_way: deque[Copy] = deque()
        self._n_begun = 0

    def begin(self, ipa: int, tags: memoryview, flags: int) -> Copy:
        """Begin to copy at most `COPY_GRANULES` from or to guest memory, by KVM's `flags`."""
        if len(self._under_way) == _N_PARTS:
            self._settle_first()
        part = self._n_begun % _N_PARTS * COPY_GRANULES
        if flags == uapi.KVM_ARM_TAGS_TO_GUEST:
            self._session.write_buffer(tags, part)
        reads = flags == uapi.KVM_ARM_TAGS_FROM_GUEST
        copy = Copy(tags, part, reads, self._ioctl(ipa, len(tags), part, flags))
        self._n_begun += 1
        self._under_way.append(copy)
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

    def nothing(self, flags: int = uapi.KVM_ARM_TAGS_FROM_GUEST) -> int:
        """Copy nothing, which shows whether a copy would pass every check.

        A copy to the guest is also refused while the VM logs dirty pages.
        """
        return self._session.finish(self._ioctl(0, 0, 0, flags))

    def _settle_first(self) -> None:
        # It stays the first until it has returned: a signal of ours may end the wait.
        copy = self._under_way[0]
        try:
            answer: int | Exception = self._session.finish(copy.begun)
            if copy.reads and isinstance(answer, int) and answer > 0:
                n_granules = min(answer // uapi.GRANULE_BYTES, len(copy.tags))
                self._session.read_buffer(copy.tags[:n_granules], copy.part)
        except (MtetoolError, OSError) as error:
            answer = error
        copy.answer = answer
        self._under_way.popleft()

    def _ioctl(self, ipa: int, n_granules: int, part: int, flags: int) -> Future[int]:
        argument = uapi.copy_mte_tags(
            ipa, n_granules * uapi.GRANULE_BYTES, self._session.buffer_address + part, flags
        )
        return self._session.begin_ioctl(self._fd, uapi.KVM_ARM_MTE_COPY_TAGS, argument)
