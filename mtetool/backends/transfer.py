"""Copies of tags through a VMM's transfer buffer, in which the next is under way already.

The kernel's copy is what takes the time: while it fills one half of the buffer, what is in the
other is fetched. One ioctl copies at most half the buffer: its loop neither reschedules nor looks
at signals.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

from mtetool import uapi
from mtetool.attach.session import Session
from mtetool.errors import GuestError

HALF_BYTES = 4 << 20
"""What one ioctl copies at most: 4 MiB of tags, 64 MiB of guest memory."""

BUFFER_BYTES = 2 * HALF_BYTES


class _Stretch(NamedTuple):
    """Tags of guest memory in a half of the buffer."""

    ipa: int
    n_granules: int
    half: int

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
        self._ready: _Stretch | None = None
        # Up to there it was handed out: whoever reads that again wants the tags of now.
        self._used_up_to = 0
        self._under_way: tuple[_Stretch, Future[int]] | None = None

    def read(self, ipa: int, out: memoryview, then_bytes: int) -> int:
        """Fill `out` with tags from `ipa` on: bytes of guest memory completed, or -errno.

        `then_bytes` of guest memory behind it will be read next, so that their copy may begin.
        """
        done, then = 0, then_bytes // uapi.GRANULE_BYTES
        while done < len(out):
            at = ipa + done * uapi.GRANULE_BYTES
            found = self._held(at)
            if found is None:
                result = self._fetch(at, len(out) - done + then)
                if result <= 0:
                    return done * uapi.GRANULE_BYTES or result
                continue
            first = (at - found.ipa) // uapi.GRANULE_BYTES
            part = out[done : done + found.n_granules - first]
            self._session.read_buffer(part, found.half * HALF_BYTES + first)
            done += len(part)
            self._used_up_to = at + len(part) * uapi.GRANULE_BYTES
        return done * uapi.GRANULE_BYTES

    def write(self, ipa: int, tags: memoryview, *, then_read: bool = False) -> int:
        """Copy tags to guest memory from `ipa` on; at most a half.

        With `then_read` that memory is read next: the copy back begins right behind.
        """
        self.drop()
        self._session.write_buffer(tags)
        stretch = _Stretch(ipa, len(tags), 0)
        begun = self._begin(stretch, uapi.KVM_ARM_TAGS_TO_GUEST)
        if then_read:
            back = stretch._replace(half=1)
            self._under_way = (back, self._begin(back, uapi.KVM_ARM_TAGS_FROM_GUEST))
        result = self._session.finish(begun)
        if result != len(tags) * uapi.GRANULE_BYTES:
            self.drop()
        return result

    def nothing(self) -> int:
        """A copy of nothing: it passes every check there is, or does not."""
        return self._session.finish(self._begin(_Stretch(0, 0, 0), uapi.KVM_ARM_TAGS_FROM_GUEST))

    def drop(self) -> None:
        """Forget what was read ahead: what comes next is to be of a later moment."""
        self._ready = None
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            # Whoever asks for that memory again is told what is wrong with it.
            with suppress(GuestError, OSError):
                self._session.finish(under_way[1])

    def _held(self, ipa: int) -> _Stretch | None:
        ready = self._ready
        return ready if ready is not None and self._used_up_to == ipa < ready.end else None

    def _fetch(self, ipa: int, n_granules: int) -> int:
        """Have tags from `ipa` on in the buffer, and more under way where that is wanted."""
        self._ready = None
        if self._under_way is None or self._under_way[0].ipa != ipa:
            self.drop()
            wanted = _Stretch(ipa, min(n_granules, HALF_BYTES), 0)
            self._under_way = (wanted, self._begin(wanted, uapi.KVM_ARM_TAGS_FROM_GUEST))
        stretch, begun = self._under_way
        result = self._session.finish(begun)
        # Only now: until it came back, nobody else may use its half, whatever interrupts us.
        self._under_way = None
        if result <= 0:
            return result
        completed = stretch._replace(n_granules=result // uapi.GRANULE_BYTES)
        left = n_granules - completed.n_granules
        if completed == stretch and left > 0:
            ahead = _Stretch(completed.end, min(left, HALF_BYTES), 1 - completed.half)
            self._under_way = (ahead, self._begin(ahead, uapi.KVM_ARM_TAGS_FROM_GUEST))
        self._ready, self._used_up_to = completed, ipa
        return result

    def _begin(self, stretch: _Stretch, flags: int) -> Future[int]:
        session = self._session
        argument = uapi.copy_mte_tags(
            stretch.ipa,
            stretch.n_granules * uapi.GRANULE_BYTES,
            session.buffer_address + stretch.half * HALF_BYTES,
            flags,
        )
        return session.begin_ioctl(self._fd, uapi.KVM_ARM_MTE_COPY_TAGS, argument)
