"""The emulated guest's file: created atomically, sparse, locked, and refused when damaged."""

from __future__ import annotations

import fcntl
import os
import random
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from mtetool.backends import open_guest
from mtetool.backends.emu.file import damaged, refused
from mtetool.backends.emu.guest import EmulatedGuest, create_emulated, open_emulated
from mtetool.backends.emu.owner import Owner
from mtetool.errors import (
    BadNameError,
    BusyError,
    DiskFullError,
    EmulatorFileError,
    FileExistsAlreadyError,
    MisalignedError,
    MteOffError,
    MtetoolError,
    NoSuchFileError,
    PermissionRefusedError,
    RangeError,
    SourceError,
    TooLateError,
    UsageError,
)
from mtetool.files.fields import pack_map
from mtetool.guest import GuestOptions, Memslot
from mtetool.uapi import GRANULE_BYTES

BASE = 0x4000_0000
MIB = 1 << 20
SLOTS = (Memslot(0, BASE, MIB), Memslot(1, BASE + 2 * MIB, MIB, readonly=True, kind="rom"))


@pytest.fixture
def path(tmp_path: Path) -> str:
    """An emulated guest with a writable and a read-only slot, MTE on, one vCPU."""
    found = str(tmp_path / "guest")
    create_emulated(found, memslots=SLOTS)
    return found


def opened(path: str) -> EmulatedGuest:
    return open_emulated(path, GuestOptions())


def allocated_bytes(path: str) -> int:
    return Path(path).stat().st_blocks * 512


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def tags_of(guest: EmulatedGuest, ipa: int, size_bytes: int) -> np.ndarray:
    out = np.full(size_bytes // GRANULE_BYTES, 0xEE, dtype=np.uint8)
    assert guest.read_tags(ipa, out) == size_bytes
    return out


# --- creation -----------------------------------------------------------------------------


def test_mode_and_content(path: str) -> None:
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    with opened(path) as guest:
        info = guest.info()
    assert (info.source, info.mte, info.page_size_bytes) == (f"emu:{path}", True, 4096)
    assert info.memslots == SLOTS
    assert info.vcpus == 1


def test_nothing_is_left_beside_it(path: str) -> None:
    assert names(Path(path).parent) == ["guest"]


def test_slots_are_put_in_order(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    create_emulated(path, memslots=SLOTS[::-1])
    with opened(path) as guest:
        assert guest.info().memslots == SLOTS


def test_existing_only_with_force(path: str) -> None:
    with opened(path) as guest:
        guest.owner.set_tag(BASE, 16, 5)
    with pytest.raises(FileExistsAlreadyError):
        create_emulated(path, memslots=SLOTS)
    with opened(path) as guest:
        assert tags_of(guest, BASE, 4096)[0] == 5
    create_emulated(path, memslots=SLOTS[:1], force=True)
    with opened(path) as guest:
        assert guest.info().memslots == SLOTS[:1]
        assert not tags_of(guest, BASE, MIB).any()


def test_a_guest_in_use_is_not_replaced(path: str) -> None:
    with opened(path), pytest.raises(BusyError):
        create_emulated(path, memslots=SLOTS, force=True)


def test_what_is_no_place_for_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for bad, error in [
        (str(tmp_path), SourceError),
        ("", BadNameError),
        (str(tmp_path / "fifo"), SourceError),
        (str(tmp_path / "no" / "guest"), NoSuchFileError),
        (str(tmp_path / ("n" * 300)), BadNameError),
        (str(tmp_path / "fifo" / "guest"), NoSuchFileError),
    ]:
        with pytest.raises(error):
            create_emulated(bad, memslots=SLOTS, force=True)
    assert names(tmp_path) == ["fifo"]


def test_through_a_symbolic_link(tmp_path: Path, path: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    create_emulated(str(link), memslots=SLOTS[:1], force=True)
    assert link.is_symlink()
    with opened(path) as guest:
        assert guest.info().memslots == SLOTS[:1]


def test_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "guest"

    def take_the_name(owner: Owner) -> None:
        path.write_text("precious")

    with pytest.raises(FileExistsAlreadyError):
        create_emulated(str(path), memslots=SLOTS, fill=take_the_name)
    assert path.read_text() == "precious"
    assert names(tmp_path) == ["guest"]


def test_a_fill_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(owner: Owner) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_emulated(str(tmp_path / "guest"), memslots=SLOTS, fill=fail)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("slots", "error"),
    [
        ([], UsageError),
        ([Memslot(0, 0, 0)], RangeError),
        ([Memslot(0, 2048, 4096)], MisalignedError),
        ([Memslot(0, 4096, 2048)], MisalignedError),
        ([Memslot(0, (1 << 64) - 4096, 8192)], RangeError),
        ([Memslot(0, 0, 8192), Memslot(1, 4096, 4096)], UsageError),
        ([Memslot(0, 4096, 4096), Memslot(1, 4096, 4096)], UsageError),
        ([Memslot(0, 0, 4096), Memslot(0, 4096, 4096)], UsageError),
    ],
)
def test_layouts_that_no_guest_has(
    tmp_path: Path, slots: list[Memslot], error: type[MtetoolError]
) -> None:
    with pytest.raises(error) as caught:
        create_emulated(str(tmp_path / "guest"), memslots=slots)
    assert caught.value.status == 2
    assert names(tmp_path) == []


def test_page_sizes(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        create_emulated(str(tmp_path / "a"), page_size_bytes=8192, memslots=SLOTS)
    for page in (16384, 65536):
        small = [Memslot(0, page, page // 2)]
        with pytest.raises(MisalignedError):
            create_emulated(str(tmp_path / "a"), page_size_bytes=page, memslots=small)


def test_many_slots(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    slots = [Memslot(number, number * 8192, 4096) for number in range(2000)]
    create_emulated(path, memslots=slots)
    with opened(path) as guest:
        assert len(guest.info().memslots) == 2000
        guest.owner.set_tag(1999 * 8192, 4096, 7)
        assert (tags_of(guest, 1999 * 8192, 4096) == 7).all()
        assert not tags_of(guest, 1998 * 8192, 4096).any()


# --- sparse -------------------------------------------------------------------------------


def test_a_tebibyte_takes_no_space(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    create_emulated(path, memslots=[Memslot(0, BASE, 1 << 40)])
    assert Path(path).stat().st_size >= 1 << 36
    last = BASE + (1 << 40) - 4096
    with opened(path) as guest:
        guest.write_tags(last, np.full(256, 9, dtype=np.uint8))
        assert (tags_of(guest, last, 4096) == 9).all()
    assert allocated_bytes(path) < MIB


def test_reading_allocates_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    create_emulated(path, memslots=[Memslot(0, BASE, 1 << 30)])
    before = allocated_bytes(path)
    with opened(path) as guest:
        assert not tags_of(guest, BASE, 1 << 30).any()
    assert allocated_bytes(path) == before


def test_writing_what_is_there_allocates_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    create_emulated(path, memslots=[Memslot(0, BASE, 1 << 30)])
    before = allocated_bytes(path)
    # Zeros except for two granules, and a high nibble, which does not count.
    tags = np.zeros(1 << 26, dtype=np.uint8)
    tags[[3 * MIB + 5, 40 * MIB - 1]] = 0xF3
    tags[17] = 0x50
    with opened(path) as guest:
        assert guest.write_tags(BASE, tags) == 1 << 30
        after = allocated_bytes(path)
        assert before < after <= before + 2 * 4096 + 64 * 1024
        found = tags_of(guest, BASE, 1 << 30)
    assert np.flatnonzero(found).tolist() == [3 * MIB + 5, 40 * MIB - 1]
    assert set(found[found > 0].tolist()) == {3}


def test_what_is_left_alone_are_blocks_of_the_file(path: str) -> None:
    # From the middle of the file's first block of tags to the end of its second; only the
    # second has anything new.
    before = allocated_bytes(path)
    tags = np.zeros(8192 - 256, dtype=np.uint8)
    tags[4096 - 256] = 1
    with opened(path) as guest:
        guest.write_tags(BASE + 4096, tags)
    assert allocated_bytes(path) - before <= 4096


@pytest.mark.parametrize("seed", range(20))
def test_any_writes_against_an_array(tmp_path: Path, seed: int) -> None:
    """Random writes, aligned to granules only, over two adjacent slots, against a model."""
    draw = random.Random(seed)  # noqa: S311
    page = draw.choice([4096, 16384, 65536])
    first, second = draw.randint(1, 40) * page, draw.randint(1, 40) * page
    slots = [Memslot(0, BASE, first), Memslot(1, BASE + first, second)]
    path = str(tmp_path / "guest")
    create_emulated(path, page_size_bytes=page, memslots=slots)
    model = np.zeros((first + second) // GRANULE_BYTES, dtype=np.uint8)
    with opened(path) as guest:
        for _ in range(30):
            start = draw.randrange(model.size)
            stop = draw.randint(start + 1, model.size)
            if draw.random() < 0.5:
                tag = draw.choice([0, 0, draw.randrange(16)])
                guest.owner.set_tag(BASE + start * 16, (stop - start) * 16, tag)
                model[start:stop] = tag
            else:
                start, stop = start * 16 // page * page // 16, -(-stop * 16 // page) * page // 16
                tags = model[start:stop].copy()
                tags[draw.randrange(tags.size)] = draw.randrange(256)
                assert guest.write_tags(BASE + start * 16, tags) == tags.size * 16
                model[start:stop] = tags & 15
            assert np.array_equal(tags_of(guest, BASE, first + second), model)


# --- the owner's side ---------------------------------------------------------------------


def test_set_tag_by_granules_and_in_read_only_memory(path: str) -> None:
    with opened(path) as guest:
        guest.owner.set_tag(BASE + 16, 32, 0xF)
        assert tags_of(guest, BASE, 4096)[:5].tolist() == [0, 15, 15, 0, 0]
        guest.owner.set_tag(BASE + 2 * MIB, MIB, 3)
        assert (tags_of(guest, BASE + 2 * MIB, MIB) == 3).all()


def test_set_tag_refuses_and_changes_nothing(path: str) -> None:
    with opened(path) as guest:
        for ipa, size_bytes, tag, error in [
            (BASE + 8, 16, 1, MisalignedError),
            (BASE, 8, 1, MisalignedError),
            (BASE, 0, 1, MisalignedError),
            (BASE, 2 * MIB, 1, RangeError),
            (BASE - 16, 32, 1, RangeError),
            (0, 16, 1, RangeError),
            (BASE, 16, 16, UsageError),
        ]:
            with pytest.raises(error):
                guest.owner.set_tag(ipa, size_bytes, tag)
        assert not tags_of(guest, BASE, MIB).any()


def test_fill_by_slots(path: str) -> None:
    with opened(path) as guest:
        guest.owner.fill("random", 1, [1])
        assert not tags_of(guest, BASE, MIB).any()
        assert tags_of(guest, BASE + 2 * MIB, MIB).any()
        guest.owner.fill("zero", 1)
        assert not tags_of(guest, BASE + 2 * MIB, MIB).any()
        with pytest.raises(UsageError, match="no memslot 7"):
            guest.owner.fill("random", 1, [0, 7])
        assert not tags_of(guest, BASE, MIB).any()


def test_device_memory_has_no_tags(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    create_emulated(path, memslots=[SLOTS[0], Memslot(4, 0, MIB, kind="device")])
    with opened(path) as guest:
        with pytest.raises(OSError, match="Errno 14"):
            guest.read_tags(0, np.zeros(256, dtype=np.uint8))
        with pytest.raises(RangeError):
            guest.owner.set_tag(0, 16, 1)
        guest.owner.fill("random", 1)


def test_mte_off_on_the_owners_side(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    create_emulated(path, memslots=SLOTS, mte=False, vcpus=0)
    with opened(path) as guest:
        with pytest.raises(MteOffError):
            guest.owner.set_tag(BASE, 16, 1)
        with pytest.raises(MteOffError):
            guest.owner.fill("random", 1)
        assert guest.enable_mte()
    with opened(path) as guest:
        assert guest.info().mte is True
        assert not tags_of(guest, BASE, MIB).any()


def test_too_late_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    create_emulated(str(path), memslots=SLOTS, mte=False, vcpus=2)
    before = path.read_bytes()
    with opened(str(path)) as guest, pytest.raises(TooLateError):
        guest.enable_mte()
    assert path.read_bytes() == before


def test_told_memslots_replace_the_layout(path: str) -> None:
    told = (Memslot(0, BASE, 4096),)
    with open_guest(f"emu:{path}", GuestOptions(memslots=told)) as guest:
        assert guest.info().memslots == told


def test_addresses_do_not_wrap_around(tmp_path: Path) -> None:
    """No kernel has memory at the end of 64 bits, but a copy there must not continue at 0."""
    path = str(tmp_path / "guest")
    top = (1 << 64) - 4096
    create_emulated(path, memslots=[Memslot(0, 0, 4096), Memslot(1, top, 4096)])
    with opened(path) as guest:
        assert guest.write_tags(top, np.ones(512, dtype=np.uint8)) == 4096
        assert guest.read_tags(top, np.zeros(512, dtype=np.uint8)) == 4096
        assert not tags_of(guest, 0, 4096).any()
        with pytest.raises(RangeError):
            guest.owner.set_tag(top, 8192, 1)
        for ipa in (1 << 64, (1 << 64) + 4096, -4096):
            with pytest.raises(OSError, match="Errno 14"):
                guest.read_tags(ipa, np.zeros(256, dtype=np.uint8))


# --- concurrent use -----------------------------------------------------------------------


def test_readers_share_and_a_writer_excludes(path: str) -> None:
    page = np.ones(256, dtype=np.uint8)
    with opened(path) as a, opened(path) as b:
        assert tags_of(a, BASE, 4096).tolist() == tags_of(b, BASE, 4096).tolist()
        with pytest.raises(BusyError):
            b.write_tags(BASE, page)
        # It can still read, and still keeps others from writing.
        assert not tags_of(b, BASE, 4096).any()
        a.close()
        with opened(path) as c, pytest.raises(BusyError):
            c.write_tags(BASE, page)
        b.write_tags(BASE, page)
        with pytest.raises(BusyError):
            opened(path)
    with opened(path) as guest:
        assert (tags_of(guest, BASE, 4096) == 1).all()


def test_busy_in_another_process(path: str) -> None:
    script = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX);"
    script += "print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(BusyError) as caught:
            opened(path)
        process.communicate()
    assert caught.value.status == 4
    opened(path).close()


def test_close_ends_the_lock_and_the_use(path: str) -> None:
    guest = opened(path)
    guest.owner.set_tag(BASE, 16, 1)
    guest.close()
    with pytest.raises(ValueError, match="closed"):
        guest.read_tags(BASE, np.zeros(256, dtype=np.uint8))
    with Path(path).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_that_may_only_be_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anything, so the refusal is faked.
    real_open = os.open

    def open_read_only(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", name)
        return real_open(name, flags, *rest)

    monkeypatch.setattr(os, "open", open_read_only)
    with opened(path) as guest:
        assert not tags_of(guest, BASE, MIB).any()
        with pytest.raises(PermissionRefusedError):
            guest.write_tags(BASE, np.ones(256, dtype=np.uint8))


def test_disk_full_is_no_answer_of_the_guest(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with opened(path) as guest:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError):
            guest.write_tags(BASE, np.ones(256, dtype=np.uint8))


# --- files that must not be trusted -------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    for name in ("no", "no/guest"):
        with pytest.raises(NoSuchFileError):
            opened(str(tmp_path / name))
    with pytest.raises(SourceError):
        opened("")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for bad in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(EmulatorFileError):
            opened(str(bad))


@pytest.mark.parametrize("content", [b"", b"\x89", b"\x89MTEEMU\n", b"hello, world" * 100])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "guest"
    path.write_bytes(content)
    with pytest.raises(EmulatorFileError):
        opened(str(path))


def test_every_bit_of_the_header_counts(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    used = 28 + int.from_bytes(content[12:16], "little")
    for at in range(used):
        for bit in (0x01, 0x80):
            content[at] ^= bit
            Path(path).write_bytes(content)
            with pytest.raises(EmulatorFileError):
                opened(path)
            content[at] ^= bit
    Path(path).write_bytes(content)
    opened(path).close()


def test_truncated_and_extended(path: str) -> None:
    size = Path(path).stat().st_size
    for wrong in (size - 1, size + 1, size // 2, 100, 20):
        os.truncate(path, wrong)
        what = "it is truncated" if wrong < size else "does not match"
        with pytest.raises(EmulatorFileError, match=what):
            opened(path)


def test_truncated_while_it_is_open(path: str) -> None:
    with opened(path) as guest:
        os.truncate(path, 65536 + 100)
        with pytest.raises(EmulatorFileError, match="while it was open"):
            guest.read_tags(BASE, np.zeros(MIB // 16, dtype=np.uint8))


def _with_description(packed: bytes, size: int) -> bytes:
    head = b"\x89MTEEMU\n" + (1).to_bytes(4, "little") + len(packed).to_bytes(4, "little")
    head += size.to_bytes(8, "little")
    content = head + zlib.crc32(head + packed).to_bytes(4, "little") + packed
    return content.ljust(size, b"\0")


_SLOT = {"id": 0, "ipa": 0, "size": 4096, "readonly": False, "kind": "ram", "hugetlb": False}
_GUEST = {"page_size": 4096, "mte": True, "vcpus": 1, "memslots": [_SLOT], "behaviours": []}


@pytest.mark.parametrize(
    "wrong",
    [
        {"page_size": 4095},
        {"page_size": None},
        {"mte": 1},
        {"mte": None},
        {"vcpus": -1},
        {"memslots": []},
        {"memslots": None},
        {"memslots": [7]},
        {"memslots": [_SLOT, _SLOT]},
        {"memslots": [{**_SLOT, "size": 0}]},
        {"memslots": [{**_SLOT, "size": 1 << 63}]},
        {"memslots": [{**_SLOT, "ipa": 100}]},
        {"memslots": [{**_SLOT, "ipa": (1 << 64) - 4096, "size": 8192}]},
        {"memslots": [{**_SLOT, "readonly": None}]},
        {"memslots": [{**_SLOT, "kind": "toast"}]},
        {"memslots": [{**_SLOT, "more": 1}]},
        {"memslots": [{**_SLOT, "hugetlb": 1}]},
        {"behaviours": None},
        {"behaviours": ["toast"]},
        {"behaviours": [[]]},
        {"more": 1},
    ],
)
def test_well_formed_nonsense(tmp_path: Path, wrong: dict[str, object]) -> None:
    path = tmp_path / "guest"
    size = 65536 + 65536
    path.write_bytes(_with_description(pack_map(_GUEST), size))
    opened(str(path)).close()
    path.write_bytes(_with_description(pack_map({**_GUEST, **wrong}), size))
    with pytest.raises(EmulatorFileError) as caught:
        opened(str(path))
    assert caught.value.status == 4


@pytest.mark.parametrize("packed", [b"", b"\xc1", b"\x81", b"\x90", b"\x91" * 5000, b"\xde\xff"])
def test_descriptions_that_cannot_be_decoded(tmp_path: Path, packed: bytes) -> None:
    path = tmp_path / "guest"
    path.write_bytes(_with_description(packed, 131072))
    with pytest.raises(EmulatorFileError):
        opened(str(path))


def test_high_nibbles_neither_in_the_file_nor_out_of_it(path: str) -> None:
    with opened(path) as guest:
        guest.write_tags(BASE, np.full(256, 0xA5, dtype=np.uint8))
    content = bytearray(Path(path).read_bytes())
    assert content.count(0x05, 65536) == 256
    content[65536:65792] = b"\xb6" * 256
    Path(path).write_bytes(content)
    with opened(path) as guest:
        assert (tags_of(guest, BASE, 4096) == 6).all()


def test_errors_name_the_file() -> None:
    assert "guest 1" in damaged("guest 1", "it is not").message
    assert "EIO" in refused(OSError(5, "Input/output error"), "x").message
