"""Copies of tags through a VMM's transfer buffer, in which the next are under way already.

The kernel's copy is what takes the time, and one follows the other without waiting for us: while
it fills one part of the buffer, what is in another is fetched, looked at or made. One ioctl copies
a quarter of the buffer at most: its loop neither reschedules nor looks at signals.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

from mtetool import uapi
from mtetool.attach.session import Session
from mtetool.errors import GuestError

COPY_BYTES = 4 << 20
"""What one ioctl copies at most: 4 MiB of tags, 64 MiB of guest memory."""

# Room for a copy, and for what is read back of one that is written.
_HALF_BYTES = 2 * COPY_BYTES

BUFFER_BYTES = 2 * _HALF_BYTES


class _Copy(NamedTuple):
    """A copy that was begun: tags of guest memory, to or from `at` in the buffer."""

    ipa: int
    n_granules: int
    at: int
    begun: Future[int]

    @property
    def end(self) -> int:
        return self.ipa + self.n_granules * uapi.GRANULE_BYTES


class Transfer:
    """The buffer of one session, used for the VM behind `fd`.

    Lengths are in granules; what the kernel answers is given as it is, 0 or more, or -errno.
    """

    def __init__(self, session: Session, fd: int) -> None:
        self._session = session
        self._fd = fd
        # Reads in the order of their addresses, one after the other, each with half a buffer.
        self._ahead: deque[_Copy] = deque()
        # Up to there they were handed out: whoever reads that again wants the tags of now.
        self._used_up_to = 0
        # What is read back, each after its write.
        self._back: deque[_Copy] = deque()
        self._half = 0

    def read(self, ipa: int, out: memoryview, then_bytes: int) -> int:
        """Fill `out` with tags from `ipa` on: bytes of guest memory completed, or -errno.

        `then_bytes` of guest memory after it will be read next, so that their copy may begin.
        """
        if self._back:
            back = self._back.popleft()
            if (back.ipa, back.n_granules) == (ipa, len(out)) and self._is_whole(back):
                self._session.read_buffer(out, back.at)
                return len(out) * uapi.GRANULE_BYTES
            self.drop()
        return self._read(ipa, out, ipa + len(out) * uapi.GRANULE_BYTES + then_bytes)

    def _read(self, ipa: int, out: memoryview, until: int) -> int:
        done = 0
        while done < len(out):
            at = ipa + done * uapi.GRANULE_BYTES
            if not self._ahead or self._used_up_to != at:
                self.drop()
                self._used_up_to = at
            self._read_ahead(until)
            copy = self._ahead[0]
            result = self._session.finish(copy.begun)
            first = (at - copy.ipa) // uapi.GRANULE_BYTES
            n_granules = min(result // uapi.GRANULE_BYTES - first, len(out) - done)
            if n_granules <= 0:
                self.drop()
                if first:
                    continue  # it came to here: asked again, it says why
                return done * uapi.GRANULE_BYTES or result
            self._session.read_buffer(out[done : done + n_granules], copy.at + first)
            done += n_granules
            self._used_up_to = at + n_granules * uapi.GRANULE_BYTES
            if self._used_up_to == copy.end:
                self._ahead.popleft()
                self._read_ahead(until)
        return done * uapi.GRANULE_BYTES

    def _read_ahead(self, until: int) -> None:
        """Begin copies into the halves that are free."""
        at = self._ahead[-1].end if self._ahead else self._used_up_to
        while len(self._ahead) < 2 and at < until:
            n_granules = min((until - at) // uapi.GRANULE_BYTES, COPY_BYTES)
            room = self._next_half()
            copy = self._begin(at, n_granules, room, uapi.KVM_ARM_TAGS_FROM_GUEST)
            self._ahead.append(copy)
            at = copy.end

    def begin_write(self, ipa: int, tags: memoryview, *, then_read: bool) -> Callable[[], int]:
        """Begin to copy tags to guest memory from `ipa` on, at most `COPY_BYTES`.

        Whoever calls the result waits for it, and gets what the kernel answered. At most two may be
        begun and not waited for. With `then_read` that memory is read afterwards, in the same
        order: the copy back begins right after.
        """
        self._drop_ahead()
        room = self._next_half()
        self._session.write_buffer(tags, room)
        copy = self._begin(ipa, len(tags), room, uapi.KVM_ARM_TAGS_TO_GUEST)
        if then_read:
            room += COPY_BYTES
            back = self._begin(ipa, len(tags), room, uapi.KVM_ARM_TAGS_FROM_GUEST)
            self._back.append(back)

        def finish() -> int:
            result = self._session.finish(copy.begun)
            if result != len(tags) * uapi.GRANULE_BYTES:
                self.drop()
            return result

        return finish

    def nothing(self, flags: int = uapi.KVM_ARM_TAGS_FROM_GUEST) -> int:
        """A copy of nothing: it passes every check there is, or does not.

        One to the guest is refused while the VM logs dirty pages, too.
        """
        return self._session.finish(self._begin(0, 0, 0, flags).begun)

    def drop(self) -> None:
        """Forget what was read ahead or back: what comes next is to be of a later moment."""
        self._drop_ahead()
        while self._back:
            self._is_whole(self._back.popleft())

    def _drop_ahead(self) -> None:
        # Waited for: until it came back, nobody else may use its part of the buffer.
        while self._ahead:
            self._is_whole(self._ahead.popleft())

    def _is_whole(self, copy: _Copy) -> bool:
        """Wait for a copy. Whoever asks for that memory again is told what is wrong with it."""
        with suppress(GuestError, OSError):
            return self._session.finish(copy.begun) == copy.n_granules * uapi.GRANULE_BYTES
        return False

    def _next_half(self) -> int:
        room, self._half = self._half, _HALF_BYTES - self._half
        return room

    def _begin(self, ipa: int, n_granules: int, room: int, flags: int) -> _Copy:
        session = self._session
        argument = uapi.copy_mte_tags(
            ipa, n_granules * uapi.GRANULE_BYTES, session.buffer_address + room, flags
        )
        begun = session.begin_ioctl(self._fd, uapi.KVM_ARM_MTE_COPY_TAGS, argument)
        return _Copy(ipa, n_granules, room, begun)
