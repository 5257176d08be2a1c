"""Registers are asked only of stopped vCPUs, and tables read only where the guest's memory is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, cast

import pytest

from mtetool import uapi
from mtetool.attach import memory
from mtetool.attach.session import Session
from mtetool.backends.kvm import registers
from mtetool.backends.kvm.addresses import address_spaces, proven_place
from mtetool.backends.kvm.page_tables import Read
from mtetool.backends.kvm.registers import Vcpu, ask_vcpus
from mtetool.backends.kvm.virtual import GuestMemory
from mtetool.errors import BusyError, NoVcpuError, PageTableError
from mtetool.guest import Memslot
from mtetool.spans import Place, Span
from mtetool.vmm import proc
from mtetool.vmm.hostmemory import HostMemory
from tests.backends.kvm.tables import Tables

_BASE = 0x4000_0000
_PAGE = 4096


class _Process:
    """A session whose vCPUs have registers, which they report only while they are held."""

    pid = 1
    buffer_address = 0x6D_0000_0000

    def __init__(self, values: dict[int, int], answers: dict[int, int] | None = None) -> None:
        self._values = values
        self._answers = answers or {}
        self._buffer = b""
        self.held = False
        self.n_holds = 0
        self.patience: set[float] = set()

    def begin_ioctl(self, fd: int, request: int, argument: bytes) -> Future[int]:
        assert self.held, "this call would wait for KVM_RUN, for ever"
        assert request == uapi.KVM_GET_ONE_REG
        register, at = uapi.KVM_ONE_REG_STRUCT.unpack(argument)
        assert at == self.buffer_address
        begun: Future[int] = Future()
        begun.set_result(self._answers.get(register, 0))
        self._buffer = (self._values.get(register, 0) + fd).to_bytes(8, "little")
        return begun

    def finish(self, begun: Future[int], patience: float) -> int:
        self.patience.add(patience)
        return begun.result()

    def read_buffer(self, out: memoryview) -> None:
        out[:] = self._buffer

    def release(self) -> None:
        self.held = False


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(session: Any, pid: int, n_vcpus: int, *, main_too: bool, patience: float) -> int:
        assert main_too
        assert patience <= 5.0
        session.held = True
        session.n_holds += 1
        return n_vcpus

    monkeypatch.setattr(registers, "hold_vcpus", hold)


def _ask(process: _Process, *, held: bool = False) -> list[Vcpu]:
    return ask_vcpus(cast(Session, process), 1, 2, {0: 0, 3: 16}, held=held)


@pytest.mark.usefixtures("holding")
def test_all_vcpus_are_asked_in_one_stop() -> None:
    process = _Process({registers._TCR: 0x1000, registers._SCTLR: 0x100})
    first, second = _ask(process)
    assert (first.number, second.number) == (0, 3)
    assert (first.registers.tcr, second.registers.tcr) == (0x1000, 0x1010)
    assert (process.n_holds, process.held) == (1, False)
    assert max(process.patience) <= 5.0


@pytest.mark.usefixtures("holding")
def test_vcpus_that_are_held_already_stay_held() -> None:
    process = _Process({})
    process.held = True
    _ask(process, held=True)
    assert (process.n_holds, process.held) == (0, True)


@pytest.mark.usefixtures("holding")
def test_a_register_that_a_kernel_does_not_know() -> None:
    process = _Process({}, {registers._TCR2: -errno.ENOENT})
    assert _ask(process)[1].registers.tcr2 == 0


@pytest.mark.usefixtures("holding")
@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOEXEC, "never initialized"), (errno.EIO, "EIO"), (errno.ENOENT, "ENOENT")],
)
def test_whatever_the_kernel_answers_the_vcpus_run_on(number: int, message: str) -> None:
    process = _Process({}, {registers._TTBR0: -number})
    with pytest.raises(NoVcpuError, match=message):
        _ask(process)
    assert not process.held


@pytest.mark.usefixtures("holding")
def test_an_answer_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracer is stuck then, and cannot release them; that mtetool ends does."""

    def late(self: _Process, begun: Future[int], patience: float) -> int:
        raise BusyError("process 1 did not answer for 2 seconds")

    monkeypatch.setattr(_Process, "finish", late)
    with pytest.raises(BusyError, match="did not answer"):
        _ask(_Process({}))


@pytest.mark.usefixtures("holding")
def test_a_guest_that_is_a_hypervisor() -> None:
    with pytest.raises(PageTableError, match="EL2"):
        _ask(_Process({registers._PSTATE: 0x3C9}))


# --- memory ---------------------------------------------------------------------------------


class _Pagemap:
    """Memory of this process, of which everything from `end` on does not exist."""

    def __init__(self, end: int) -> None:
        self._end = end

    def has_pages(self, start: int, end: int) -> bool:
        return end <= self._end

    def existing(self, start: int, end: int) -> Iterator[Span]:
        yield Span(start, end)


def _memory(
    monkeypatch: pytest.MonkeyPatch, places: list[Place], end: int = 1 << 47
) -> GuestMemory:
    monkeypatch.setattr(memory, "read", lambda pid, at, length: at.to_bytes(8, "little"))
    host = HostMemory(cast(Any, _Pagemap(end)), places)
    return GuestMemory(os.getpid(), [Memslot(0, _BASE, 16 * _PAGE)], host)


def test_a_table_is_read_where_its_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(_BASE, 16 * _PAGE, 0x7000_0000)
    found = _memory(monkeypatch, [place]).read(_BASE + 0x2008, 8)
    assert int.from_bytes(found, "little") == 0x7000_2008


@pytest.mark.parametrize(
    ("places", "ipa", "message"),
    [
        ([Place(_BASE, 16 * _PAGE, 0x7000_0000)], _BASE - 8, "is not in the guest's memory"),
        ([Place(_BASE, 16 * _PAGE, 0x7000_0000)], _BASE + 16 * _PAGE, "is not in the guest's"),
        ([Place(_BASE, 16 * _PAGE, 0x7000_0000)], _BASE + 8 * _PAGE, "has never written"),
        ([], _BASE, "unknown where in the VMM"),
        ([Place(_BASE, 16 * _PAGE, at) for at in (0x7000_0000, 0x8000_0000)], _BASE, "unknown"),
    ],
)
def test_a_table_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, places: list[Place], ipa: int, message: str
) -> None:
    guest = _memory(monkeypatch, places, end=0x7000_0000 + 8 * _PAGE)
    with pytest.raises(PageTableError, match=message):
        guest.read(ipa, 8)


def test_memory_that_is_gone_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = _memory(monkeypatch, [Place(_BASE, 16 * _PAGE, 0x7000_0000)])

    def fail(pid: int, at: int, length: int) -> bytes:
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(memory, "read", fail)
    with pytest.raises(PageTableError, match="cannot be read: Bad address"):
        guest.read(_BASE, 8)


# --- the place that only the guest tells -----------------------------------------------------


def _vcpu(tables: Tables, vectors: int, *, on: bool = True) -> Vcpu:
    values = dict.fromkeys(registers._ALL, 0)
    values |= {
        registers._SCTLR: int(on),
        registers._TCR: tables.tcr(),
        registers._TTBR1: tables.ttbr(),
        registers._VBAR: vectors,
    }
    return Vcpu(0, values)


def test_the_place_from_which_the_guest_finds_its_vectors() -> None:
    tables = Tables(_PAGE, 48, wide=False, half=1)
    tables.map(0x1234_5000, _BASE + 0x5000, 3)
    vcpu = _vcpu(tables, tables.whole(0x1234_5000))
    slots = [Memslot(0, _BASE, 1 << 30)]
    right, wrong = Place(_BASE, 1 << 30, 0x7000_0000), Place(_BASE, 1 << 30, 0x9000_0000)

    def reader(place: Place) -> Read:
        return tables.read if place == right else lambda ipa, length: b"\x5a" * length

    assert proven_place([vcpu], [wrong, right], slots, reader) == right
    assert proven_place([vcpu], [wrong], slots, reader) is None
    # Two that could be are none; nor is anything proven by a vCPU without tables.
    assert proven_place([vcpu], [right, wrong], slots, lambda place: tables.read) is None
    off = _vcpu(tables, tables.whole(0x1234_5000), on=False)
    assert proven_place([off], [right], slots, reader) is None
    # Nor if they lead out of memory.
    assert proven_place([vcpu], [right], [Memslot(0, 0, _BASE)], reader) is None


# --- which vCPU ------------------------------------------------------------------------------


class _Vm:
    process = proc.VmmProcess(1, 1, "vmm", (3,), 2)

    @property
    def session(self) -> Session:
        raise AssertionError("nothing needs to be attached for that")


@pytest.mark.parametrize(
    ("vm_fds", "vcpus", "number", "message"),
    [
        ({3, 4}, {0: 5}, None, "several VMs"),
        ({3}, {}, None, "has no vCPU yet"),
        ({3}, {0: 5, 1: 6}, 2, "has no vCPU 2"),
    ],
)
def test_vcpus_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch,
    vm_fds: set[int],
    vcpus: dict[int, int],
    number: int | None,
    message: str,
) -> None:
    monkeypatch.setattr(proc, "vm_fds", lambda pid: frozenset(vm_fds))
    monkeypatch.setattr(proc, "vcpu_fds", lambda pid: vcpus)
    host = HostMemory(cast(Any, _Pagemap(0)), [])
    with pytest.raises(NoVcpuError, match=message):
        address_spaces(cast(Any, _Vm()), [], host, number, held=False)


def test_memory_of_which_it_is_unknown_whether_it_exists() -> None:
    with pytest.raises(PageTableError, match="could allocate memory"):
        address_spaces(cast(Any, _Vm()), [], None, None, held=False)


def test_the_descriptors_of_vcpus(monkeypatch: pytest.MonkeyPatch) -> None:
    links = {
        7: "anon_inode:kvm-vcpu:1",
        5: "anon_inode:kvm-vcpu:0",
        3: "anon_inode:kvm-vm",
        9: "anon_inode:kvm-vcpu:0",
        4: "anon_inode:kvm-vcpu:x",
    }
    monkeypatch.setattr(proc, "_fd_links", lambda pid: links)
    assert proc.vcpu_fds(1) == {0: 5, 1: 7}
