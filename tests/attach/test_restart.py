"""Calls that a stop interrupted: which call it was, and what a signal does to it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from mtetool.attach import memory, restart
from mtetool.attach.ptrace import Registers, Stop, Tracee

_PC = 0x400100
_SVC = 0xD4000001
_NOP = 0xD503201F
_NANOSLEEP, _FUTEX, _RESTART, _PPOLL, _READ = 101, 98, 128, 73, 63
_ENTRY = Stop(5, 0, syscall=True)


def _movz(number: int, *, wide: bool) -> int:
    return (0xD2800008 if wide else 0x52800008) | number << 5


def _registers(number: int, x3: int = 0) -> Registers:
    x = [0] * 31
    x[3], x[8] = x3, number
    return Registers(tuple(x), sp=0x7FFF0000, pc=_PC, pstate=0)


class _FakeTracee(Tracee):
    def __init__(self, registers: Registers, stops: list[Stop]) -> None:
        super().__init__(1)
        self.state = registers
        self.stops = stops
        self.delivered: list[int] = []

    def registers(self) -> Registers:
        return self.state

    def set_registers(self, registers: Registers) -> None:
        self.state = registers

    def to_syscall_stop(self, signal: int = 0) -> Stop:
        self.delivered.append(signal)
        return self.stops.pop(0)


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(*ahead: int) -> None:
        words = [_NOP] * (16 - len(ahead)) + [*ahead, _SVC]
        text = struct.pack(f"<{len(words)}I", *words)
        start = _PC - 4 * 16

        def read(pid: int, address: int, length: int) -> bytes:
            return text[address - start : address - start + length]

        monkeypatch.setattr(memory, "read", read)

    return put


@pytest.mark.parametrize("wide", [True, False])
def test_call_behind_restart_syscall_is_told_from_the_code(
    code: Callable[..., None], wide: bool
) -> None:
    code(_movz(_FUTEX, wide=wide), _NOP, _NOP)
    assert restart.settle(1, _FakeTracee(_registers(_RESTART), [])) == _FUTEX


@pytest.mark.parametrize("ahead", [(), (_movz(_READ, wide=True),)])
def test_call_that_cannot_be_told_is_left_as_it_is(
    code: Callable[..., None], ahead: tuple[int, ...]
) -> None:
    code(*ahead)
    assert restart.settle(1, _FakeTracee(_registers(_RESTART), [])) == _RESTART


def test_futex_without_a_time_out_needs_no_settling(code: Callable[..., None]) -> None:
    code()
    assert restart.settle(1, _FakeTracee(_registers(_FUTEX), [])) == _FUTEX


@pytest.mark.parametrize(
    ("number", "x3", "answer"),
    [
        (_PPOLL, 0, "EINTR"),
        (_RESTART, 0, "EINTR"),
        (_NANOSLEEP, 0, "EINTR"),
        (_FUTEX, 0x1000, "EINTR"),
        (_FUTEX, 0, "anew"),
        (_READ, 0, "anew"),
    ],
)
def test_handled_signal_breaks_off_what_it_would_have(
    code: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    x3: int,
    answer: str,
) -> None:
    code()
    monkeypatch.setattr(restart, "_caught", lambda pid, tid, signal: signal == 10)
    registers = _registers(number, x3)
    # SIGWINCH has no handler: it is delivered, and interrupts nothing.
    tracee = _FakeTracee(registers, [Stop(28, 0, syscall=False), Stop(10, 0, syscall=False)])
    assert restart.resume(1, tracee, registers) == 10
    assert tracee.delivered == [0, 28]
    if answer == "anew":
        assert tracee.state == registers
    else:
        assert (tracee.state.pc, tracee.state.x[0]) == (_PC + 4, 2**64 - 4)


def test_without_a_signal_the_thread_enters_its_call(code: Callable[..., None]) -> None:
    code()
    registers = _registers(_PPOLL)
    tracee = _FakeTracee(registers, [_ENTRY])
    assert restart.resume(1, tracee, registers) == 0
    assert tracee.state == registers
