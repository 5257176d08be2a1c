"""The transfer buffer: copies take effect in order, and none uses another's room."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import cast

import pytest

from mtetool import uapi
from mtetool.attach.chain_room import ARGUMENT_BYTES, MOST_CALLS
from mtetool.attach.session import Session
from mtetool.backends.kvm.transfer import (
    BUFFER_BYTES,
    COPY_GRANULES,
    DEPTH,
    SMALL_GRANULES,
    Transfer,
)
from mtetool.errors import GuestLostError

_BASE = 0x4000_0000
_COPY = COPY_GRANULES * uapi.GRANULE_BYTES
_READ, _WRITE = uapi.KVM_ARM_TAGS_FROM_GUEST, uapi.KVM_ARM_TAGS_TO_GUEST


class _Process:
    """A session with a VM: one tag everywhere, and no memory from `end` on.

    `chains` has the lengths of the chains of calls that were made.

    A copy that was begun is done only when any copy is waited for, as late as possible.
    """

    buffer_address = 0

    def __init__(self) -> None:
        self.buffer = bytearray(BUFFER_BYTES)
        self.end = _BASE + 64 * _COPY
        self.lost = False
        self.unreadable: int | None = None
        self.asked: list[int] = []
        self.memory: dict[int, bytes] = {}
        self.chains: list[int] = []
        self.may_chain = True
        self._begun: deque[tuple[bytes, Future[int]]] = deque()

    def begin_ioctl(self, fd: int, request: int, argument: bytes) -> Future[int]:
        begun: Future[int] = Future()
        self._begun.append((argument, begun))
        return begun

    def begin_chain(self, fd: int, request: int, arguments: bytes) -> Future[int]:
        return self.begin_ioctl(fd, request, arguments)

    def finish(self, begun: Future[int]) -> int:
        while not begun.done():
            arguments, future = self._begun.popleft()
            if len(arguments) == ARGUMENT_BYTES:
                future.set_result(self._ioctl(arguments))
            else:
                future.set_result(self._chain(arguments))
        if self.lost:
            raise GuestLostError("the process ended")
        return begun.result()

    def _chain(self, arguments: bytes) -> bool:
        if self.may_chain:
            self.chains.append(len(arguments) // ARGUMENT_BYTES)
            for at in range(0, len(arguments), ARGUMENT_BYTES):
                self._ioctl(arguments[at : at + ARGUMENT_BYTES])
        return self.may_chain

    def _ioctl(self, argument: bytes) -> int:
        ipa, length, at, flags, *_ = (
            int.from_bytes(argument[n : n + 8], "little") for n in range(0, len(argument), 8)
        )
        self.asked.append(ipa)
        done = min(length, max(self.end - ipa, 0))
        n = done // uapi.GRANULE_BYTES
        if flags == _WRITE:
            self.memory[ipa] = bytes(self.buffer[at : at + n])
        else:
            self.buffer[at : at + n] = self.memory.get(ipa, bytes([1]) * n)[:n]
        return done or -errno.EFAULT

    def read_buffer(self, out: memoryview, offset: int) -> None:
        if offset == self.unreadable:
            raise OSError(errno.EPERM, "no")
        out[:] = self.buffer[offset : offset + len(out)]

    def write_buffer(self, data: memoryview, offset: int) -> None:
        self.buffer[offset : offset + len(data)] = data


@pytest.fixture
def process() -> _Process:
    return _Process()


@pytest.fixture
def transfer(process: _Process) -> Transfer:
    return Transfer(cast("Session", process), 3)


def _room(n_granules: int = 256) -> memoryview:
    return memoryview(bytearray(n_granules))


def test_writes_with_their_read_backs(process: _Process, transfer: Transfer) -> None:
    """At the full depth, each read-back has the tags of its own write."""
    parts = [memoryview(bytes([n]) * COPY_GRANULES) for n in range(2, 9)]
    begun = []
    for n, part in enumerate(parts):
        out = _room(COPY_GRANULES)
        write = transfer.begin(_BASE + n * _COPY, part, _WRITE)
        begun.append((write, transfer.begin(_BASE + n * _COPY, out, _READ), part, out))
        if len(begun) == DEPTH:
            write, back, wanted, found = begun.pop(0)
            assert transfer.finish(write) == transfer.finish(back) == _COPY
            assert found == wanted
    assert process.asked == [_BASE + n // 2 * _COPY for n in range(len(process.asked))]


def test_more_than_there_is_room_for(transfer: Transfer) -> None:
    rooms = [_room(16) for _ in range(20)]
    copies = [transfer.begin(_BASE, room, _READ) for room in rooms]
    assert [transfer.finish(copy) for copy in copies] == [256] * 20
    assert all(set(room) == {1} for room in rooms)


def test_what_is_drained_keeps_its_answer(process: _Process, transfer: Transfer) -> None:
    process.end = _BASE + 4096
    out, short, nowhere = _room(), _room(512), _room()
    copies = [
        transfer.begin(_BASE, out, _READ),
        transfer.begin(_BASE, short, _READ),
        transfer.begin(_BASE + 8192, nowhere, _READ),
    ]
    transfer.drain()
    process.memory[_BASE] = bytes([9]) * 512
    assert [transfer.finish(copy) for copy in copies] == [4096, 4096, -errno.EFAULT]
    assert set(out) == {1}
    assert [set(short[:256]), set(short[256:]), set(nowhere)] == [{1}, {0}, {0}]


def test_a_later_one_settles_those_before(transfer: Transfer) -> None:
    first, second = _room(), _room()
    transfer.begin(_BASE, first, _READ)
    assert transfer.finish(transfer.begin(_BASE, second, _READ)) == 4096
    assert set(first) == {1}


def test_a_process_that_ended(process: _Process, transfer: Transfer) -> None:
    copies = [transfer.begin(_BASE, _room(), _READ) for _ in range(2)]
    process.lost = True
    transfer.drain()
    for copy in copies:
        with pytest.raises(GuestLostError):
            transfer.finish(copy)


def test_an_error_belongs_to_its_copy(process: _Process, transfer: Transfer) -> None:
    rooms = [_room(SMALL_GRANULES + 256) for _ in range(3)]
    copies = [transfer.begin(_BASE, room, _READ) for room in rooms]
    process.unreadable = COPY_GRANULES  # the second part of the buffer
    transfer.drain()
    assert transfer.finish(copies[0]) == transfer.finish(copies[2])
    with pytest.raises(PermissionError):
        transfer.finish(copies[1])


def _pages(n_pages: int) -> list[int]:
    return [_BASE + 8192 * n for n in range(n_pages)]


@pytest.mark.parametrize("may_chain", [True, False])
def test_small_copies_are_made_together(
    process: _Process, transfer: Transfer, may_chain: bool
) -> None:
    process.may_chain = may_chain
    begun = []
    for n, ipa in enumerate(_pages(100)):
        tags, out = memoryview(bytes([n % 16]) * 256), _room()
        begun.append((transfer.begin(ipa, tags, _WRITE), tags, out))
        begun.append((transfer.begin(ipa, out, _READ), tags, out))
    assert process.asked == []
    for copy, tags, out in begun:
        assert transfer.finish(copy) == 4096
        assert out == tags
    assert process.chains == ([300] if may_chain else [])


def test_what_a_chain_could_not_copy_is_asked_alone(process: _Process, transfer: Transfer) -> None:
    process.end = _BASE + 3 * 8192 + 2048
    rooms = [_room() for _ in range(5)]
    copies = [transfer.begin(ipa, room, _READ) for ipa, room in zip(_pages(5), rooms, strict=True)]
    answers = [transfer.finish(copy) for copy in copies]
    assert answers == [4096, 4096, 4096, 2048, -errno.EFAULT]
    assert [set(room) for room in rooms] == [{1}, {1}, {1}, {0, 1}, {0}]
    assert process.asked[5:] == _pages(5)[3:]


def test_writes_keep_their_order_after_one_that_failed(
    process: _Process, transfer: Transfer
) -> None:
    """The first is refused in the chain only: the second one's tags must stand in the end."""
    writes, out = [memoryview(bytes([n]) * 256) for n in (3, 4)], _room()
    refused = [True]

    def ioctl(argument: bytes, made: Callable[[bytes], int] = process._ioctl) -> int:
        if refused and int.from_bytes(argument[24:32], "little") == _WRITE:
            refused.clear()
            return -errno.EBUSY
        return made(argument)

    process._ioctl = ioctl  # type: ignore[method-assign]
    copies = [transfer.begin(_BASE, tags, _WRITE) for tags in writes]
    back = transfer.begin(_BASE, out, _READ)
    assert [transfer.finish(copy) for copy in (*copies, back)] == [4096] * 3
    assert process.memory[_BASE] == bytes(out) == bytes([4]) * 256


def test_interrupted_wait_is_taken_up_again(process: _Process, transfer: Transfer) -> None:
    process.end = _BASE + 8192
    rooms = [_room() for _ in range(3)]
    copies = [transfer.begin(ipa, room, _READ) for ipa, room in zip(_pages(3), rooms, strict=True)]
    finish = process.finish

    def interrupted(begun: Future[int]) -> int:
        if process.chains:
            process.finish = finish  # type: ignore[method-assign]
            raise KeyboardInterrupt
        return finish(begun)

    process.finish = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        transfer.drain()
    assert [transfer.finish(copy) for copy in copies] == [4096, -errno.EFAULT, -errno.EFAULT]
    assert [set(room) for room in rooms] == [{1}, {0}, {0}]


def test_chains_of_any_length(process: _Process, transfer: Transfer) -> None:
    process.end = 1 << 40
    ipas = [_BASE + 8192 * n for n in range(3 * MOST_CALLS)]
    copies = [transfer.begin(ipa, _room(), _READ) for ipa in ipas]
    assert {transfer.finish(copy) for copy in copies} == {4096}
    assert process.chains == [MOST_CALLS] * 3
    assert process.asked == ipas


def test_large_ones_between_small_ones(process: _Process, transfer: Transfer) -> None:
    sizes = [256, 256, SMALL_GRANULES + 256, 256, 256, COPY_GRANULES, 256]
    copies = [transfer.begin(_BASE + n * _COPY, _room(size), _READ) for n, size in enumerate(sizes)]
    transfer.send()
    assert [transfer.finish(copy) for copy in copies] == [size * 16 for size in sizes]
    assert process.asked == [_BASE + n * _COPY for n in range(len(sizes))]


def test_a_copy_of_nothing_is_in_order(process: _Process, transfer: Transfer) -> None:
    out = _room()
    copy = transfer.begin(_BASE, out, _READ)
    assert transfer.nothing() == -errno.EFAULT  # as this process answers
    assert transfer.finish(copy) == 4096
    assert process.asked == [_BASE, 0]
