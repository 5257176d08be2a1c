"""Buffers whose memory is allocated before they are used."""

from __future__ import annotations

import os
import resource
import signal

import pytest

from mtetool import buffers
from mtetool.buffers import prepared, unshared

MIB = 1 << 20


@pytest.mark.parametrize("n_bytes", [0, 1, 4096, 3 * MIB + 5])
@pytest.mark.parametrize("populates", [True, False])
def test_all_of_it_can_be_written_and_is_zero(
    n_bytes: int, populates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not populates:
        monkeypatch.setattr(buffers, "_MADV_POPULATE_WRITE", 9999)  # as before Linux 5.14
    room = prepared(n_bytes)
    assert room == bytes(n_bytes)
    room[:] = b"\7" * n_bytes
    assert room.nbytes == n_bytes


@pytest.mark.parametrize("populates", [True, False])
def test_using_it_faults_nothing_in(populates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not populates:
        monkeypatch.setattr(buffers, "_MADV_POPULATE_WRITE", 9999)
    room, tags = prepared(16 * MIB), b"\7" * MIB
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for at in range(0, len(room), MIB):
        room[at : at + MIB] = tags
    # With small pages it would be 4096.
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 8


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_forked_process_shares_is_copied_at_once(shared: bool) -> None:
    room = bytearray(b"\1" * 4 * MIB)
    child = os.fork()
    if not child:
        signal.pause()
    try:
        if not shared:
            unshared()
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for at in range(0, len(room), 4096):
            room[at] = 2
        n_faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
        assert n_faults >= 1000 if shared else n_faults < 8
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_more_than_there_is() -> None:
    with pytest.raises(MemoryError):
        prepared(1 << 60)
