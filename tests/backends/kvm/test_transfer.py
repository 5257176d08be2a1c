"""The transfer buffer: what was read ahead is used once, and by the next read only."""

from __future__ import annotations

import errno
from concurrent.futures import Future
from typing import cast

import pytest

from mtetool import uapi
from mtetool.attach.session import Session
from mtetool.backends.kvm.transfer import BUFFER_BYTES, COPY_BYTES, Transfer

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
        self.written: dict[int, bytes] = {}

    def begin_ioctl(self, fd: int, request: int, argument: bytes) -> Future[int]:
        ipa, length, at, flags, *_ = (
            int.from_bytes(argument[n : n + 8], "little") for n in range(0, len(argument), 8)
        )
        self.asked.append(ipa)
        begun: Future[int] = Future()
        done = min(length, max(self.end - ipa, 0))
        n = done // uapi.GRANULE_BYTES
        if flags == uapi.KVM_ARM_TAGS_TO_GUEST:
            self.written[ipa] = bytes(self.buffer[at : at + n])
        else:
            self.buffer[at : at + n] = self.written.get(ipa, bytes([self.tag]) * n)
        begun.set_result(done or -errno.EFAULT)
        return begun

    def finish(self, begun: Future[int]) -> int:
        return begun.result()

    def read_buffer(self, out: memoryview, offset: int) -> None:
        out[:] = self.buffer[offset : offset + len(out)]

    def write_buffer(self, data: memoryview, offset: int) -> None:
        self.buffer[offset : offset + len(data)] = data


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


def test_writes_that_follow_each_other_are_read_back_each(
    process: _Process, transfer: Transfer
) -> None:
    """The next one is under way while one is read back, and neither takes the other's room."""
    parts = [memoryview(bytes([n]) * COPY_BYTES) for n in (3, 4, 5, 6)]
    out = memoryview(bytearray(COPY_BYTES))
    begun = transfer.begin_write(_BASE, parts[0], then_read=True)
    for n, part in enumerate(parts):
        finish = begun
        if n + 1 < len(parts):
            begun = transfer.begin_write(_BASE + (n + 1) * _COPY, parts[n + 1], then_read=True)
        assert finish() == _COPY
        assert transfer.read(_BASE + n * _COPY, out, 0) == _COPY
        assert out == part
    # A write and its copy back for each, and nothing twice.
    assert process.asked == [_BASE + n // 2 * _COPY for n in range(8)]


def test_what_was_not_read_back_whole_is_asked_for_again(
    process: _Process, transfer: Transfer
) -> None:
    part, out = memoryview(bytes([3]) * _PAGE), memoryview(bytearray(_PAGE))
    size = _PAGE * uapi.GRANULE_BYTES
    process.end = _BASE + size
    first = transfer.begin_write(_BASE, part, then_read=True)
    second = transfer.begin_write(_BASE + size, part, then_read=True)
    assert (first(), transfer.read(_BASE, out, 0)) == (size, size)
    assert second() == -errno.EFAULT
    assert transfer.read(_BASE + size, out, 0) == -errno.EFAULT
    # Other memory than was written: what was read back is of no use to it.
    transfer.begin_write(_BASE, part, then_read=True)()
    process.end = _BASE + 9 * size
    process.tag = 7
    assert transfer.read(_BASE + 2 * size, out, 0) == size
    assert set(out.tobytes()) == {7}
