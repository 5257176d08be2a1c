"""Faults in an emulated guest's file: they outlive a process, and their counts span processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from mtetool.backends import open_guest
from mtetool.backends.emu import guest as guest_module
from mtetool.backends.emu.fault_block import _packed
from mtetool.backends.emu.file import FAULTS_BYTES, open_file
from mtetool.backends.emu.guest import EmulatedGuest, create_emulated, open_emulated
from mtetool.errors import (
    BusyError,
    DiskFullError,
    EmulatorFileError,
    GuestLostError,
    NoSuchProcessError,
    UsageError,
)
from mtetool.faults.guest import Delay, Fail, Fault, FaultyGuest, Rate, Vanish
from mtetool.faults.model import Counted, Faults
from mtetool.files.fields import pack_map
from mtetool.guest import GuestOptions, Memslot
from mtetool.uapi import GRANULE_BYTES

BASE = 0x4000_0000
PAGE = 4096
SIZE = 64 * PAGE
ALL = (
    Fault(Fail(errno.EFAULT), on="read", at=(BASE, 2**64 - BASE), after=2**64 - 1, times=3),
    Fault(Fail(errno.EINTR), on="write", every=1000, chance=0.1, seed=2**64 - 1),
    Fault(Delay(1)),
    Fault(Rate(1 << 40)),
    Fault(Vanish(), after=10**6),
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    create_emulated(str(tmp_path / "guest"), memslots=(Memslot(0, BASE, SIZE),))
    return str(tmp_path / "guest")


def opened(path: str) -> EmulatedGuest:
    return open_emulated(path, GuestOptions())


def order(path: str, *faults: Fault) -> None:
    with opened(path) as guest:
        guest.owner.set_faults(faults)


def read(path: str, n_pages: int = 1, *, page: int = 0) -> int | str:
    """Open the guest anew and read; return how many pages were read, or the errno's name."""
    with open_guest(f"emu:{path}") as guest:
        try:
            out = np.zeros(n_pages * PAGE // GRANULE_BYTES, dtype=np.uint8)
            return guest.read_tags(BASE + page * PAGE, out) // PAGE
        except OSError as error:
            return errno.errorcode[error.errno or 0]


def test_they_are_kept_as_they_were_given(path: str) -> None:
    size = Path(path).stat().st_size
    order(path, *ALL)
    with opened(path) as guest:
        found = guest.owner.faults()
    assert found.ordered == ALL
    assert found.counted == [Counted()] * len(ALL)
    assert Path(path).stat().st_size == size + FAULTS_BYTES
    order(path)
    assert Path(path).stat().st_size == size
    with open_guest(f"emu:{path}") as plain:
        assert type(plain) is EmulatedGuest


def test_from_the_beginning_on(tmp_path: Path) -> None:
    path = str(tmp_path / "new")
    create_emulated(path, memslots=(Memslot(0, BASE, SIZE),), faults=ALL)
    with opened(path) as guest:
        assert guest.owner.faults().ordered == ALL


def test_too_many_leave_those_that_were(path: str) -> None:
    order(path, *ALL)
    with pytest.raises(UsageError, match="17 faults"):
        order(path, *[Fault(Vanish())] * 17)
    with opened(path) as guest:
        assert guest.owner.faults().ordered == ALL
    longest = Fault(
        Rate(2**64 - 1), "write", (2**63, 2**63), 2**64 - 1, 2**64 - 1, 1e-300, 2**64 - 1, 2**64 - 1
    )
    faults = Faults((longest,) * 16, [Counted(2**64 - 1, 2**64 - 1, 2**64 - 1)] * 16)
    assert len(_packed(faults)) + 16 <= 4096


def test_counts_go_on_in_the_next_process(path: str) -> None:
    order(path, Fault(Fail(errno.EFAULT), after=4, times=2))
    assert [read(path, 3), read(path, 3)] == [3, 1]
    assert [read(path), read(path), read(path)] == ["EFAULT", "EFAULT", 1]
    with opened(path) as guest:
        assert guest.owner.faults().counted[0].fired == 2
        assert guest.owner.faults().is_spent(0)


def test_its_owner_meets_none(path: str) -> None:
    order(path, Fault(Fail(errno.EFAULT)))
    with opened(path) as guest:
        guest.owner.set_tag(BASE, SIZE, 3)
        guest.owner.fill("random", 1)
        assert guest.read_tags(BASE, np.zeros(256, dtype=np.uint8)) == PAGE
        assert guest.owner.faults().counted[0] == Counted()
    assert read(path) == "EFAULT"


def test_a_guest_that_vanished_is_no_process_until_it_has_other_faults(path: str) -> None:
    order(path, Fault(Vanish(), on="read"))
    with open_guest(f"emu:{path}") as guest, open_guest(f"emu:{path}") as other:
        with pytest.raises(GuestLostError):
            other.read_tags(BASE, np.ones(256, dtype=np.uint8))
        with pytest.raises(GuestLostError):
            guest.info()
    with pytest.raises(NoSuchProcessError):
        open_guest(f"emu:{path}")
    order(path)
    assert read(path) == 1


def test_a_file_that_may_only_be_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order(path, Fault(Fail(errno.EFAULT), after=2))
    before = Path(path).read_bytes()

    def only_to_read(name: str) -> tuple[int, bool]:
        os.close(open_file(name)[0])
        return os.open(name, os.O_RDONLY), False

    monkeypatch.setattr(guest_module, "open_file", only_to_read)
    for _ in range(2):
        with open_guest(f"emu:{path}") as guest:
            out = np.zeros(512, dtype=np.uint8)
            assert guest.read_tags(BASE, out) == 2 * PAGE
            with pytest.raises(OSError, match="EFAULT"):
                guest.read_tags(BASE, out)
    assert Path(path).read_bytes() == before


def test_readers_at_the_same_time_count_together(path: str) -> None:
    order(path, Fault(Fail(errno.EFAULT), every=5))
    program = (
        "import sys, tests.backends.emu.test_fault_block as t;"
        "print([t.read(sys.argv[1]) for _ in range(100)].count('EFAULT'))"
    )
    readers = [
        subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    failed = [int(reader.communicate(timeout=60)[0]) for reader in readers]
    assert sum(failed) == 60
    with opened(path) as guest:
        assert guest.owner.faults().counted[0] == Counted(copies=300, pages=300, fired=60)


def test_they_are_not_changed_while_somebody_works_on_it(path: str) -> None:
    order(path, ALL[0])
    with open_guest(f"emu:{path}"), pytest.raises(BusyError):
        order(path)


def test_two_in_one_process(path: str) -> None:
    order(path, Fault(Delay(1)))
    with open_guest(f"emu:{path}") as first, open_guest(f"emu:{path}") as second:
        out = np.zeros(256, dtype=np.uint8)
        for guest in (first, second, first):
            assert isinstance(guest, FaultyGuest)
            assert guest.read_tags(BASE, out) == PAGE
    with opened(path) as again:
        assert again.owner.faults().counted[0].fired == 3


def test_closed(path: str) -> None:
    order(path, ALL[0])
    guest = open_guest(f"emu:{path}")
    guest.close()
    guest.close()
    with pytest.raises(ValueError, match="closed"):
        guest.read_tags(BASE, np.zeros(256, dtype=np.uint8))


def test_a_full_disk_leaves_a_guest_without_faults(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def filling_up(fd: int, data: memoryview, offset: int) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real(fd, data[:20], offset))
        return written[-1]

    real = os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", filling_up)
        with pytest.raises(DiskFullError):
            order(path, *ALL)
    assert read(path) == 1
    with opened(path) as guest:
        assert guest.owner.faults().ordered == ()


def test_who_dies_before_they_are_written_leaves_a_guest_without(path: str) -> None:
    os.truncate(path, Path(path).stat().st_size + FAULTS_BYTES)
    assert read(path) == 1
    order(path, Fault(Fail(errno.EFAULT)))
    assert read(path) == "EFAULT"


def test_disk_full(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order(path, Fault(Delay(1)))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_guest(f"emu:{path}") as guest:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError):
            guest.read_tags(BASE, np.zeros(256, dtype=np.uint8))


# --- blocks that must not be trusted ------------------------------------------------------


def test_every_bit_counts(path: str) -> None:
    order(path, *ALL)
    content = bytearray(Path(path).read_bytes())
    start = len(content) - FAULTS_BYTES
    used = 16 + int.from_bytes(content[start + 8 : start + 12], "little")
    for at in range(start, start + used):
        content[at] ^= 0x10
        Path(path).write_bytes(content)
        with pytest.raises(EmulatorFileError):
            open_guest(f"emu:{path}")
        content[at] ^= 0x10


ROW = {
    "effect": "errno",
    "number": 14,
    "on": None,
    "at": None,
    "size": None,
    "after": 0,
    "every": 1,
    "chance": "1.0",
    "seed": 0,
    "times": None,
    "copies": 0,
    "pages": 0,
    "fired": 0,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"effect": "party"},
        {"effect": "errno", "number": 4096},
        {"effect": "delay", "number": 0},
        {"effect": "vanish", "times": 1},
        {"on": "both"},
        {"at": 1, "size": 0},
        {"every": 0},
        {"chance": "often"},
        {"chance": "nan"},
        {"seed": 3},
        {"times": 0},
        {"pages": -1},
        {"further": 1},
    ],
)
def test_well_formed_nonsense(path: str, wrong: dict[str, object]) -> None:
    order(path, ALL[0])
    for row, believed in ((ROW, True), ({**ROW, **wrong}, False)):
        packed = pack_map({"faults": [row], "vanished": False})
        block = b"MTEFAULT" + len(packed).to_bytes(4, "little")
        block += zlib.crc32(packed).to_bytes(4, "little") + packed
        with Path(path).open("r+b") as file:
            file.seek(-FAULTS_BYTES, os.SEEK_END)
            file.write(block)
        if believed:
            open_guest(f"emu:{path}").close()
        else:
            with pytest.raises(EmulatorFileError, match="make no sense"):
                open_guest(f"emu:{path}")
