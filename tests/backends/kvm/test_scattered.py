"""Scattered pages, as arrays: what a chain left undone is where the answer stops."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from mtetool import uapi
from mtetool.attach.chain_room import MOST_CALLS
from mtetool.attach.session import Session
from mtetool.backends.kvm import scattered
from mtetool.backends.kvm.transfer import UNREAD, Transfer
from mtetool.buffers import as_bytes
from mtetool.extents import of_pages
from tests.backends.kvm.test_transfer import _BASE, _WRITE, _Process

_PAGE = 4096
_FIRST = _BASE // _PAGE


@pytest.fixture
def process() -> _Process:
    return _Process()


@pytest.fixture
def transfer(process: _Process) -> Transfer:
    return Transfer(cast("Session", process), 3)


def test_pages_of_several_chains(process: _Process, transfer: Transfer) -> None:
    process.end = 1 << 40
    pages = _FIRST + 2 * np.arange(MOST_CALLS + 100)
    tags = np.random.default_rng(1).integers(0, 16, len(pages) * 256, np.uint8)
    extents = of_pages(pages, _PAGE)
    assert scattered.write(transfer, extents, as_bytes(tags), 256) == len(tags)
    out = np.zeros_like(tags)
    assert scattered.read(transfer, extents, as_bytes(out)) == len(tags)
    assert np.array_equal(out, tags)
    assert process.chains == [MOST_CALLS, MOST_CALLS, 200, MOST_CALLS, 100]


def test_a_read_stops_before_the_first_page_that_is_not_there(
    process: _Process, transfer: Transfer
) -> None:
    process.end = _BASE + 5 * _PAGE
    extents = of_pages(_FIRST + np.array([0, 1, 4, 5, 6]), _PAGE)
    out = np.zeros(5 * 256, np.uint8)
    assert scattered.read(transfer, extents, as_bytes(out)) == 3 * 256
    process.may_chain = False
    assert scattered.read(transfer, extents, as_bytes(out)) is None


def test_a_write_stops_before_the_page_that_has_other_tags(
    process: _Process, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a page: the whole page counts as not written."""
    made = process._ioctl

    def spoiling(argument: bytes) -> int:
        answer = made(argument)
        ipa, flags = (int.from_bytes(argument[at : at + 8], "little") for at in (0, 24))
        if flags == _WRITE and ipa == _BASE + 4 * _PAGE:
            process.memory[ipa] = bytes([7]) * 100 + bytes([8]) + bytes([7]) * 155
        return answer

    monkeypatch.setattr(process, "_ioctl", spoiling)
    extents = of_pages(_FIRST + np.array([0, 2, 4, 6]), _PAGE)
    tags = np.full(4 * 256, 7, np.uint8)
    assert scattered.write(transfer, extents, as_bytes(tags), 256) == 2 * 256
    assert uapi.TAG_MAX < UNREAD
