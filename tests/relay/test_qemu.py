"""Streams of real QEMUs of two versions, on this machine; its vCPUs are emulated."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtetool.errors import StreamUnsupportedError
from mtetool.relay.stream import BEGINNING, RamStream
from tests.relay.qemu import SUITES, Qemu, qemu
from tests.relay.streams import FULL, PAGE, RAM, SAME, number

BASE = 0x4000_0000
_GUEST = ("-M", "virt", "-cpu", "max", "-m", "64M")

# A guest that adds 1 to the first word of each of 256 pages, for ever:
# movz x0, 0x4200, lsl 16; movz x1, 256; ldr w2, [x0]; add w2, w2, 1; str w2, [x0];
# add x0, x0, 1, lsl 12; subs x1, x1, 1; b.ne -20; b -32
_WRITER = struct.pack(
    "<9I",
    *(0xD2A84000, 0xD2802001, 0xB9400002, 0x11000442, 0xB9000002),
    *(0x91400400, 0xF1000421, 0x54FFFF61, 0x17FFFFF8),
)
_WRITER_AT = BASE + (1 << 20)
_WRITTEN_AT = 0x4200_0000
_WRITTEN = range((_WRITTEN_AT - BASE) // PAGE, (_WRITTEN_AT - BASE) // PAGE + 256)


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def parsed(data: bytes, piece_bytes: int = 1 << 16) -> tuple[RamStream, int]:
    """Feed a stream in pieces; return the parser, and where the rest after RAM begins."""
    parser = RamStream()
    for at in range(0, len(data), piece_bytes):
        held = parser.feed(data[at : at + piece_bytes])
        if held is not None:
            return parser, at + held
    raise AssertionError("no end of RAM")


def check_rest(rest: bytes) -> None:
    """Device sections one after the other, as the description that QEMU sends after them says."""
    found = re.search(rb"\x00\x06(....)(\{.*\})", rest, re.DOTALL)
    assert found
    end, description = found.start(), found[2]
    assert found.end() == len(rest)
    assert int.from_bytes(found[1], "big") == len(description)
    at, footer = 0, b""
    for device in json.loads(description)["devices"]:
        name = device["name"].encode()
        head = re.compile(
            re.escape(footer) + rb"\x04(....)" + re.escape(bytes([len(name)]) + name), re.S
        )
        found = head.search(rest, at)
        assert found, device["name"]
        assert at or found.start() == 0
        at, footer = found.end(), b"\x7e" + found[1]
    assert rest[end - 5 : end] == footer


def files(directory: Path) -> tuple[str, ...]:
    """The guest's program, and 4 MiB of pages that look like records of pages."""
    (directory / "writer").write_bytes(_WRITER)
    heads = b"".join(number(n << 12 | SAME | FULL, 8) for n in range(PAGE // 8))
    (directory / "heads").write_bytes(heads * 1024)
    return (
        *_GUEST,
        *("-device", f"loader,file={directory / 'writer'},addr={_WRITER_AT:#x},cpu-num=0"),
        *("-device", f"loader,file={directory / 'heads'},addr={BASE + (48 << 20):#x}"),
    )


@pytest.mark.parametrize("capabilities", [(), ("return-path",), ("return-path", "xbzrle")])
def test_a_stopped_guest(suite: str, capabilities: tuple[str, ...], tmp_path: Path) -> None:
    with qemu(tmp_path, suite, *files(tmp_path)) as vmm:
        data = vmm.stream(*capabilities)
    parser, held = parsed(data)
    assert parser.machine.startswith("virt-1")
    assert (parser.page_bytes, parser.capabilities) == (PAGE, frozenset())
    sizes = {block.name: block.size_bytes for block in parser.blocks}
    assert sizes[RAM] == sizes["virt.flash0"] == 64 << 20
    assert {"virt.flash1", "/rom@etc/acpi/tables", "/rom@etc/table-loader"} < set(sizes)
    assert [len(marks) * PAGE for marks in parser.marks] == list(sizes.values())
    assert all(marks.all() for marks in parser.marks)
    assert 1025 <= parser.n_pages < 1100
    assert parser.n_pages + parser.n_zero_pages == sum(sizes.values()) // PAGE
    assert parser.switchover_seen
    check_rest(data[held:])
    for piece_bytes in (97, 4095, len(data)):
        other, place = parsed(data[: held + 1000], piece_bytes)
        assert (place, other.n_pages, other.n_parts) == (held, parser.n_pages, parser.n_parts)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mem0"], ("-M", "virt,memory-backend=mem0", "-m", "32M")),
        (
            ["mem0", "mem1"],
            (
                *("-M", "virt", "-m", "64M", "-smp", "2"),
                *("-object", "memory-backend-ram,id=mem1,size=32M"),
                *("-numa", "node,memdev=mem0", "-numa", "node,memdev=mem1"),
            ),
        ),
    ],
)
def test_other_names_of_memory(
    suite: str, names: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    mem0 = ("-object", "memory-backend-ram,id=mem0,size=32M", "-cpu", "max")
    with qemu(tmp_path, suite, *mem0, *words) as vmm:
        parser, _ = parsed(vmm.stream())
    ram = [block for block in parser.blocks if block.name.startswith("mem")]
    assert sorted((block.name, block.size_bytes) for block in ram) == [(n, 32 << 20) for n in names]
    assert all(marks.all() for marks in parser.marks)


@pytest.mark.parametrize("xbzrle", [False, True])
def test_a_guest_that_writes(suite: str, xbzrle: bool, tmp_path: Path) -> None:
    """After the first round, only the pages that it writes come again, and all of them do."""
    for attempt in map(str, range(10)):
        (tmp_path / attempt).mkdir()
        with qemu(tmp_path / attempt, suite, *files(tmp_path)) as vmm:
            vmm.ask("cont")
            vmm.wait_until_written(_WRITTEN_AT)
            # By these, less than a page could be sent while the guest is stopped: more rounds come.
            slow = {"max-bandwidth": 16 << 20, "avail-switchover-bandwidth": 10_000}
            vmm.ask("migrate-set-parameters", **slow)
            if xbzrle:
                vmm.switch_on("xbzrle")
            parser, rest, came_again = followed(vmm)
        if parser.n_xbzrle_pages if xbzrle else came_again > len(_WRITTEN):
            break  # otherwise the guest had no time to write, and QEMU stopped it
    (number_of_ram,) = (n for n, block in enumerate(parser.blocks) if block.name == RAM)
    marks = parser.marks.pop(number_of_ram)
    assert marks.nonzero()[0].tolist() == list(_WRITTEN)
    assert not any(other.any() for other in parser.marks)
    assert (parser.n_xbzrle_pages > 0) is xbzrle
    check_rest(rest)


def followed(vmm: Qemu) -> tuple[RamStream, bytes, int]:
    """Follow a migration for some rounds, then let it end.

    Return the parser, whose marks are those after the first round; what came after RAM; and how
    many pages came in later rounds.
    """
    parser, rest = RamStream(), b""
    n_first = 0
    with vmm.migrating() as connection:
        while piece := connection.recv(1 << 16):
            if parser.done:
                rest += piece
                continue
            if (held := parser.feed(piece)) is not None:
                rest = piece[held:]
            if not n_first and parser.marks and all(marks.all() for marks in parser.marks):
                n_first = n_pages(parser)
                for marks in parser.marks:
                    marks[:] = 0
            elif n_first and n_pages(parser) - n_first > 4 * len(_WRITTEN):
                # Its answer may come only when more of the stream was read.
                vmm.request("migrate-set-parameters", **{"avail-switchover-bandwidth": 1 << 30})
    return parser, rest, n_pages(parser) - n_first


def n_pages(parser: RamStream) -> int:
    return parser.n_pages + parser.n_xbzrle_pages


@pytest.fixture
def plain(suite: str, tmp_path: Path) -> Iterator[Qemu]:
    with qemu(tmp_path, suite) as vmm:
        yield vmm


def feed(stream: bytes | socket.socket) -> None:
    parser = RamStream()
    if isinstance(stream, bytes):
        parser.feed(stream)
        return
    while piece := stream.recv(1 << 16):
        parser.feed(piece)


def refused(stream: bytes | socket.socket, words: str, *hints: str) -> None:
    """Feed a stream, or what comes from a connection, until it is refused."""
    with pytest.raises(StreamUnsupportedError, match=words) as caught:
        feed(stream)
    for hint in hints:
        assert hint in str(caught.value.hint)


@pytest.mark.parametrize("name", ["postcopy-ram", "x-ignore-shared"])
def test_a_capability_that_changes_the_stream(plain: Qemu, name: str) -> None:
    plain.switch_on(name)
    with plain.migrating() as connection:
        refused(connection, name, f"migrate_set_capability {name} off")


def test_multifd(plain: Qemu) -> None:
    """Refused on the main connection, and on each of the others."""
    plain.switch_on("multifd")
    with plain.migrating() as one, plain.accepted() as other, plain.accepted() as third:
        for connection in (one, other, third):
            refused(connection, "multifd", "migrate_set_capability multifd off")


def test_mapped_ram(plain: Qemu, tmp_path: Path) -> None:
    plain.switch_on("mapped-ram")
    plain.ask("migrate", uri=f"file:{tmp_path / 'saved'}")
    deadline = time.monotonic() + 60
    while plain.ask("query-migrate")["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    refused((tmp_path / "saved").read_bytes(), "mapped-ram", "mapped-ram off")


def test_tls(suite: str, tmp_path: Path) -> None:
    anonymous = "tls-creds-anon,id=tls,endpoint=client"
    with qemu(tmp_path, suite, *_GUEST, "-object", anonymous) as vmm:
        vmm.ask("migrate-set-parameters", **{"tls-creds": "tls"})
        with vmm.migrating() as connection:
            refused(connection, "TLS", "tls-creds")


def test_sections_without_footers(suite: str, tmp_path: Path) -> None:
    old = ("-global", "migration.send-section-footer=off")
    with qemu(tmp_path, suite, *_GUEST, *old) as vmm:
        refused(vmm.stream(), "no footers", "2.4")


def test_dirty_bitmaps(plain: Qemu) -> None:
    disk = {"driver": "null-co", "node-name": "disk", "read-zeroes": True}
    plain.ask("blockdev-add", **disk)
    plain.ask("block-dirty-bitmap-add", node="disk", name="changed")
    refused(plain.stream("dirty-bitmaps"), "dirty-bitmaps", "capability dirty-bitmaps off")


def test_virtio_mem(suite: str, tmp_path: Path) -> None:
    words = (
        *("-M", "virt", "-cpu", "max", "-m", "64M,maxmem=1G"),
        *("-object", "memory-backend-ram,id=more,size=128M,reserve=off"),
        *("-device", "virtio-mem-pci,memdev=more,requested-size=64M"),
    )
    with qemu(tmp_path, suite, *words) as vmm:
        refused(vmm.stream(), "virtio-mem.* before the end of RAM", "virtio-mem")


def test_the_monitor_of_a_destination_answers_before_the_source_sends(
    suite: str, tmp_path: Path
) -> None:
    """With libvirt, disks are copied meanwhile."""
    with qemu(tmp_path, suite, *_GUEST, "-incoming", "defer") as vmm:
        vmm.ask("migrate-incoming", uri=f"unix:{tmp_path / 'incoming'}")
        with socket.socket(socket.AF_UNIX) as relay:
            relay.connect(str(tmp_path / "incoming"))
            relay.sendall(BEGINNING)
            # After one answer it has taken the connection, or will within the next.
            for _ in range(10):
                assert vmm.ask("query-status")["status"] == "inmigrate"
