"""Cores that mtetool writes, as gdb and lldb read them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mtetool.formats.elf import HEADER_BYTES, PROGRAM_HEADER_BYTES
from mtetool.guest import Memslot
from tests.cli.running import BASE, KIB, make_guest, run, tags_of
from tests.formats.cores import core

_SLOT = Memslot(0, BASE, 512 * KIB)
_FAR = Memslot(1, BASE + 4096 * KIB, 256 * KIB)
_SLOTS = (_SLOT, _FAR)


def gdb(path: Path, *commands: str) -> str:
    """What gdb prints for commands on a core."""
    words = [word for command in (f"core {path}", *commands) for word in ("-ex", command)]
    done = subprocess.run(
        ["gdb-multiarch", "-nx", "-batch", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=path.parent,  # where it may leave a core of its own
    )
    return done.stdout + done.stderr


def lldb(path: Path, *commands: str) -> str:
    """What lldb prints for commands on a core."""
    every = (f"target create --core {path}", *commands)
    words = [word for command in every for word in ("-o", command)]
    done = subprocess.run(
        ["lldb-19", "--no-lldbinit", "--batch", *words], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("debuggers")
    guest = make_guest(directory / "guest", seed=5, slots=_SLOTS)
    assert run("save", guest, "-o", directory / "s.mtesnap").status == 0
    return directory


def test_gdb_prints_every_tag_that_was_saved(snapshot: Path) -> None:
    path = snapshot / "tags.core"
    assert run("convert", snapshot / "s.mtesnap", "--to", "core", "-o", path).status == 0
    random = np.random.default_rng(1)
    asked, wanted = [], []
    for slot in _SLOTS:
        tags = tags_of(snapshot / "guest", slot)
        last = tags.size - 1
        for granule in (0, 1, last, *random.integers(0, tags.size // 2, 40).tolist()):
            address = slot.ipa + granule * 16
            asked.append(f"memory-tag print-allocation-tag {address:#x}")
            wanted.append(int(tags[granule]))
    printed = re.findall(r"\$\d+ = 0x([0-9a-f]+)", gdb(path, *asked))
    assert [int(tag, 16) for tag in printed] == wanted
    assert any(wanted)


def test_gdb_checks_pointers_and_knows_what_it_has_not(snapshot: Path) -> None:
    path = snapshot / "checked.core"
    assert run("convert", snapshot / "s.mtesnap", "--to", "core", "-o", path).status == 0
    tag = int(tags_of(snapshot / "guest", _SLOT)[9])
    address, other = BASE + 9 * 16, (tag + 1) % 16
    text = gdb(
        path,
        f"memory-tag check {tag << 56 | address:#x}",
        f"memory-tag check {other << 56 | address:#x}",
        f"memory-tag print-allocation-tag {BASE + 1024 * KIB:#x}",
        f"x/4xb {address:#x}",
    )
    assert f"match ({tag:#x})" in text
    assert f"Logical tag ({other:#x}) does not match the allocation tag ({tag:#x})" in text
    assert "not in a region mapped with a memory tagging flag" in text
    # There is no memory in it, and gdb must not show zeros.
    assert f"Cannot access memory at address {address:#x}" in text


def dump(memory: bytes, vaddr: int = BASE) -> bytes:
    """A file as QEMU's dump-guest-memory writes it, with the first slot's memory."""
    return core(memory=[(vaddr, len(memory), memory)])


def test_memory_and_tags_in_one_core(snapshot: Path) -> None:
    path, memory = snapshot / "merged.core", np.arange(512 * KIB, dtype=np.uint32)
    content = (memory & 0xFF).astype(np.uint8).tobytes()
    (snapshot / "memory.elf").write_bytes(dump(content))
    words = ("--to", "core", "--merge", snapshot / "memory.elf")
    assert run("convert", snapshot / "s.mtesnap", *words, "-o", path).status == 0
    assert path.read_bytes().endswith(content)
    tags = tags_of(snapshot / "guest", _SLOT)
    at = BASE + 9 * 16
    lines = gdb(path, f"x/4xgm {at:#x}").splitlines()
    assert f"<Allocation Tag {tags[9]:#x} for range [{at:#x},{at + 16:#x})>" in lines
    assert f"<Allocation Tag {tags[10]:#x} for range [{at + 16:#x},{at + 32:#x})>" in lines
    assert f"{at:#x}:\t0x9796959493929190\t0x9f9e9d9c9b9a9998" in lines
    text = lldb(path, f"memory tag read {at:#x} {at + 32:#x}", f"memory region {at:#x}")
    found = re.findall(r"\[0x[0-9a-f]+, 0x[0-9a-f]+\): 0x([0-9a-f])", text)
    assert [int(tag, 16) for tag in found] == tags[9:11].tolist()
    assert "memory tagging: enabled" in text


def test_lldb_wants_memory_around_tags(snapshot: Path) -> None:
    path = snapshot / "alone.core"
    assert run("convert", snapshot / "s.mtesnap", "--to", "core", "-o", path).status == 0
    assert "not in a memory tagged region" in lldb(path, f"memory tag read {BASE:#x}")


def test_virtual_addresses_are_the_dumps(snapshot: Path) -> None:
    path, virtual = snapshot / "virtual.core", 0xFFFF_0000_4000_0000
    memory = bytes(64 * KIB)
    whole = core(memory=[(BASE, len(memory), memory)])
    # The physical address stays, the virtual one is the kernel's.
    at = HEADER_BYTES + PROGRAM_HEADER_BYTES + 16
    (snapshot / "v.elf").write_bytes(whole[:at] + virtual.to_bytes(8, "little") + whole[at + 8 :])
    words = ("--to", "core", "--merge", snapshot / "v.elf")
    assert run("convert", snapshot / "s.mtesnap", *words, "-o", path).status == 0
    tags = tags_of(snapshot / "guest", _SLOT)
    text = gdb(path, *(f"memory-tag print-allocation-tag {virtual + n * 160:#x}" for n in range(9)))
    assert [int(tag, 16) for tag in re.findall(r"= 0x(.)", text)] == tags[: 9 * 10 : 10].tolist()


def test_missing_tags_stay_missing(snapshot: Path, tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "bad", seed=5, slots=_SLOTS)
    hole = f"EFAULT,on=read,at={BASE + 8 * KIB:#x}"
    assert run("emu", "fault", tmp_path / "bad", "--fault", hole).status == 0
    assert run("save", guest, "-o", tmp_path / "s").status == 3
    path = tmp_path / "x.core"
    done = run("convert", tmp_path / "s", "--to", "core", "-o", path, "--json")
    assert (done.status, done.json["missing_bytes"]) == (3, 4096)
    places = (BASE + 4 * KIB, BASE + 8 * KIB, BASE + 12 * KIB)
    text = gdb(path, *(f"memory-tag print-allocation-tag {place:#x}" for place in places))
    tags = tags_of(snapshot / "guest", _SLOT)  # the same, without the hole
    assert re.findall(r"= 0x(.)", text) == [f"{tags[n]:x}" for n in (256, 768)]
    assert f"{places[1]:#x}" in text  # gdb says that this one is not tagged memory
    back = run("convert", path, "-o", tmp_path / "back", "--json")
    assert [item["ipa"] for item in back.json["missing"]] == [places[1]]
    assert run("diff", tmp_path / "s", tmp_path / "back").status == 3
