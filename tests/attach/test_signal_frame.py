"""The signal frame, byte by byte as the kernel reads it (arch/arm64/kernel/signal.c)."""

from __future__ import annotations

import struct

import pytest

from mtetool.attach import signal_frame
from mtetool.attach.ptrace import PSTATE_BTYPE, Registers
from mtetool.attach.signal_frame import ThreadState

REGISTERS = Registers(tuple(range(100, 131)), sp=0x7FFF0010, pc=0x400100, pstate=0x60000C00)
FPSIMD = bytes(range(256)) * 2 + struct.pack("<II8x", 0x11, 0x22)


def _sve(vector_bytes: int, *, live: bool) -> bytes:
    vq = vector_bytes // 16
    payload = bytes(i % 251 for i in range(vq * 546))
    size = 16 + len(payload)
    return struct.pack("<IIHHHH", size, size, vector_bytes, 256, int(live), 0) + payload


def _state(sve: bytes | None = None, poe: bytes | None = None) -> ThreadState:
    return ThreadState(REGISTERS, FPSIMD, sve, poe, signal_mask=0x2240)


def _records(data: bytes) -> dict[int, bytes]:
    at = 592
    found: dict[int, bytes] = {}
    while True:
        magic, size = struct.unpack_from("<II", data, at)
        if magic == 0:
            assert size == 0
            return found
        assert size % 16 == 0
        found[magic] = data[at : at + size]
        at += size


def test_frame_has_the_kernels_offsets() -> None:
    data = signal_frame.build(_state())
    assert len(data) == 4688
    assert struct.unpack_from("<Q", data, 168) == (0x2240,)
    assert struct.unpack_from("<31Q", data, 312) == REGISTERS.x
    assert struct.unpack_from("<3Q", data, 560) == (0x7FFF0010, 0x400100, 0x60000C00)
    assert data[:168] == bytes(168)  # uc_stack zero: the alternate stack is left alone


def test_floating_point_record_has_status_before_the_vectors() -> None:
    record = _records(signal_frame.build(_state()))[0x46508001]
    assert len(record) == 0x210
    assert struct.unpack_from("<II", record, 8) == (0x11, 0x22)
    assert record[16:] == FPSIMD[:512]


def test_sve_record_only_when_live() -> None:
    assert 0x53564501 not in _records(signal_frame.build(_state(_sve(64, live=False))))
    record = _records(signal_frame.build(_state(_sve(64, live=True))))[0x53564501]
    assert struct.unpack_from("<H", record, 8) == (64,)
    assert record[16 : 16 + 4 * 546] == _sve(64, live=True)[16:]


@pytest.mark.parametrize("vector_bytes", [128, 256])
def test_long_vectors_lie_behind_the_plain_records(vector_bytes: int) -> None:
    at = 0x7FFF_0000
    data = signal_frame.build(_state(_sve(vector_bytes, live=True)), at)
    records = _records(data)
    assert set(records) == {0x46508001, 0x45585401}
    extra = records[0x45585401]
    data_at, length = struct.unpack_from("<QI", extra, 8)
    assert len(extra) == 32
    assert (data_at % 16, length % 16) == (0, 0)
    # Right after the terminator of the plain records, as the kernel requires.
    assert data_at - at == 592 + 0x210 + 32 + 16
    rest = data[data_at - at : data_at - at + length]
    assert struct.unpack_from("<IIH", rest) == (0x53564501, length - 16, vector_bytes)
    assert rest[16 : 16 + vector_bytes // 16 * 546] == _sve(vector_bytes, live=True)[16:]
    assert rest[-16:] == bytes(16)


@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
def test_short_vectors_fit_a_plain_frame(vector_bytes: int) -> None:
    data = signal_frame.build(_state(_sve(vector_bytes, live=True)))
    assert len(data) == 4688
    assert set(_records(data)) == {0x46508001, 0x53564501}


def test_protection_keys_record() -> None:
    record = _records(signal_frame.build(_state(poe=struct.pack("<Q", 0x7531))))[0x504F4530]
    assert record == struct.pack("<IIQ", 0x504F4530, 16, 0x7531)


def test_calling_frame_makes_one_call_with_all_signals_blocked() -> None:
    data = signal_frame.build_calling(215, (0x1000, 0x2000), gadget=0x77, home=0x88, sp=0x90)
    x = struct.unpack_from("<31Q", data, 312)
    assert (x[0], x[1], x[8], x[30]) == (0x1000, 0x2000, 215, 0x88)
    assert struct.unpack_from("<2Q", data, 560) == (0x90, 0x77)
    assert struct.unpack_from("<Q", data, 168) == (2**64 - 1,)


def test_redirected_registers_lose_the_branch_type_only() -> None:
    called = REGISTERS.calling(29, (1, -1), gadget=0x77, home=0x88)
    assert called.pstate == 0x60000000
    assert PSTATE_BTYPE == 0xC00
    assert called.x[:2] == (1, 2**64 - 1)
    assert called.x[2:8] == REGISTERS.x[2:8]
    assert Registers.unpack(called.pack()) == called
