"""The transfer buffer: what was read ahead is used once, and by the next read only."""

from __future__ import annotations

import errno
from concurrent.futures import Future
from typing import cast

import pytest

from mtetool import uapi
from mtetool.attach.session import Session
from mtetool.backends.transfer import BUFFER_BYTES, COPY_BYTES, Transfer

_BASE = 0x4000_0000
_PAGE = 256  # granules
_COPY = COPY_BYTES * uapi.GRANULE_BYTES


class _Process:
    """A session with a VM: one tag everywhere, and no memory from `end` on."""

    buffer_address = 0

    def __init__(self) -> None:
        self.buffer = bytearray(BUFFER_BYTES)
        self.tag = 1
        self.end = _BASE + 16 * _COPY
        self.asked: list[int] = []

    def begin_ioctl(self, fd: int, request: int, argument: bytes) -> Future[int]:
        ipa, length, at, flags, *_ = (
            int.from_bytes(argument[n : n + 8], "little") for n in range(0, len(argument), 8)
        )
        assert flags == uapi.KVM_ARM_TAGS_FROM_GUEST
        self.asked.append(ipa)
        begun: Future[int] = Future()
        done = min(length, max(self.end - ipa, 0))
        n = done // uapi.GRANULE_BYTES
        self.buffer[at : at + n] = bytes([self.tag]) * n
        begun.set_result(done or -errno.EFAULT)
        return begun

    def finish(self, begun: Future[int]) -> int:
        return begun.result()

    def read_buffer(self, out: memoryview, offset: int) -> None:
        out[:] = self.buffer[offset : offset + len(out)]


@pytest.fixture
def process() -> _Process:
    return _Process()


@pytest.fixture
def transfer(process: _Process) -> Transfer:
    return Transfer(cast("Session", process), 3)


def test_the_same_memory_read_again_is_asked_for_again(
    process: _Process, transfer: Transfer
) -> None:
    out = bytearray(_PAGE)
    for tag in (1, 2, 3):
        process.tag = tag
        assert transfer.read(_BASE, memoryview(out), 0) == _PAGE * uapi.GRANULE_BYTES
        assert set(out) == {tag}


def test_memory_behind_is_asked_for_once(process: _Process, transfer: Transfer) -> None:
    out = memoryview(bytearray(COPY_BYTES // 2))
    step = len(out) * uapi.GRANULE_BYTES
    for n in range(8):
        assert transfer.read(_BASE + n * step, out, (7 - n) * step) == step
        assert set(out.tobytes()) == {1}
        # As soon as a half was handed out, the next copy into it is under way.
        assert len(process.asked) == min((n + 1) // 2 + 2, 4)
    assert process.asked == [_BASE + n * _COPY for n in range(4)]


def test_what_fails_ahead_is_told_to_who_asks_there(process: _Process, transfer: Transfer) -> None:
    out = memoryview(bytearray(COPY_BYTES))
    process.end = _BASE + _COPY
    assert transfer.read(_BASE, out, _COPY) == _COPY
    assert transfer.read(_BASE + _COPY, out, 0) == -errno.EFAULT
