"""A frozen guest, and an output that takes data slowly or not at all."""

from __future__ import annotations

import fcntl
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pytest

from mtetool.errors import OutputStalledError
from mtetool.flows.freezing import Spool

_F_SETPIPE_SZ = 1031
MIB = 1 << 20


@contextmanager
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A pipe of one page: its read end and its write end."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, _F_SETPIPE_SZ, 4096)
    with open(reading, "rb") as source, open(writing, "wb", 0) as sink:  # noqa: PTH123
        yield source, sink


def test_a_reader_that_does_not_read_does_not_hold_a_frozen_guest() -> None:
    # There is room for the first write, and none for more.
    with pipe() as (_, sink):
        spool = Spool(sink, 8192, 0)
        spool.hurry()
        spool.write(bytes(8192))
        assert not spool.overflowed
        with pytest.raises(OutputStalledError) as caught:
            spool.write(bytes(8192))
    assert spool.overflowed
    assert "--spool" in (caught.value.hint or "")


def test_a_reader_that_reads_now_and_then_does_not_either() -> None:
    # The reader takes a byte now and then, for as long as there is one.
    with pipe() as (source, sink):
        spool = Spool(sink, 0, 0)
        spool.hurry()
        done = threading.Event()

        def sip() -> None:
            while not done.wait(0.01):
                if select.select([source], [], [], 0)[0]:
                    os.read(source.fileno(), 1)

        reader = threading.Thread(target=sip)
        reader.start()
        try:
            with pytest.raises(OutputStalledError):
                spool.write(bytes(64 * MIB))
        finally:
            done.set()
            reader.join()


def test_a_reader_that_reads_gets_all_of_it() -> None:
    data = os.urandom(4 * MIB)
    got: list[bytes] = []
    with pipe() as (source, sink):
        reader = threading.Thread(target=lambda: got.append(source.read()))
        reader.start()
        spool = Spool(sink, MIB, 0)
        spool.hurry()
        for at in range(0, len(data), MIB // 2):
            spool.write(data[at : at + MIB // 2])
        assert spool.overflowed
        spool.let_through()
        spool.write(b"end")
        sink.close()
        reader.join()
    assert b"".join(got) == data + b"end"


def test_no_guest_waits_before_it_is_stopped_and_after() -> None:
    # The reader begins late: writes that are not hurried wait for it.
    with pipe() as (source, sink):
        got: list[bytes] = []
        late = threading.Timer(1.5, lambda: got.append(source.read()))
        late.start()
        spool = Spool(sink, 0, 0)
        spool.write(bytes(8192))
        spool.hurry()
        spool.let_through()
        spool.write(bytes(8192))
        sink.close()
        late.join()
    assert got == [bytes(16384)]
