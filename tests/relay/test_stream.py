"""The parser of QEMU's stream: what it marks, where it stops, and what it refuses."""

from __future__ import annotations

import itertools
import random
import re
import tracemalloc
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.errors import (
    MtetoolError,
    NoMemoryError,
    StreamDamagedError,
    StreamUnsupportedError,
)
from mtetool.relay.stream import Block, RamStream
from tests.relay import streams
from tests.relay.streams import (
    END_OF_DATA,
    FULL,
    HEADER,
    PAGE,
    RAM,
    SAME,
    XBZRLE,
    ZERO,
    Record,
    block_list,
    capabilities,
    command,
    configuration,
    end,
    footer,
    name,
    number,
    page_bits,
    part,
    start,
    stream,
    subsection,
)

BLOCKS = [(RAM, 16 * PAGE), ("virt.flash0", 4 * PAGE), ("/rom@etc/table-loader", PAGE)]
TAIL = b"\x04" + number(3, 4) + name("cpu") + bytes(100)

_FORMS = st.sampled_from([FULL, ZERO, XBZRLE])
RECORDS = st.sampled_from(BLOCKS).flatmap(
    lambda block: st.builds(
        Record,
        st.just(block[0]),
        st.integers(0, block[1] // PAGE - 1),
        _FORMS,
        st.integers(0, PAGE) | st.integers(0, 20),
    )
)
ROUNDS = st.lists(st.lists(RECORDS, max_size=12), min_size=1, max_size=4)


def marked(parser: RamStream) -> dict[str, list[int]]:
    pairs = zip(parser.blocks, parser.marks, strict=True)
    return {block.name: marks.nonzero()[0].tolist() for block, marks in pairs}


def expected(rounds: Sequence[Sequence[Record]]) -> dict[str, list[int]]:
    seen = set(itertools.chain(*rounds))
    return {block: sorted({r.page for r in seen if r.block == block}) for block, _ in BLOCKS}


def pieces(data: bytes, cuts: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    places = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    return ((first, data[first:last]) for first, last in itertools.pairwise(places))


def fed(data: bytes, cuts: Sequence[int] = ()) -> tuple[RamStream, int | None]:
    """Feed a stream in pieces, up to its end or that of RAM; return where in it that is."""
    parser = RamStream()
    for first, piece in pieces(data, cuts):
        assert not parser.done
        held = parser.feed(piece)
        assert parser.done is (held is not None)
        if held is not None:
            return parser, first + held
    return parser, None


def state(parser: RamStream) -> object:
    return (
        marked(parser),
        (parser.n_pages, parser.n_zero_pages, parser.n_xbzrle_pages, parser.n_parts),
        (parser.machine, parser.capabilities, parser.page_bytes, parser.blocks),
        (parser.in_ram_end, parser.switchover_seen, parser.done),
    )


def test_what_a_stream_says() -> None:
    rounds = [[Record(RAM, 3), Record(RAM, 4, ZERO)], [], [Record(RAM, 3, XBZRLE, 9)]]
    parser, held = fed(stream(BLOCKS, rounds) + TAIL)
    assert held == len(stream(BLOCKS, rounds))
    assert state(parser) == (
        {RAM: [3, 4], "virt.flash0": [], "/rom@etc/table-loader": []},
        (1, 1, 1, 2),
        ("virt-10.0", frozenset(), PAGE, tuple(Block(*block) for block in BLOCKS)),
        (True, True, True),
    )


@given(rounds=ROUNDS, cuts=st.lists(st.integers(0, 1 << 20), max_size=8))
def test_any_cut_gives_the_same(rounds: list[list[Record]], cuts: list[int]) -> None:
    whole = stream(BLOCKS, rounds) + TAIL
    parser, held = fed(whole, cuts)
    assert held == len(whole) - len(TAIL)
    assert marked(parser) == expected(rounds)
    assert state(parser) == state(fed(whole)[0])
    forms = [record.form for record in itertools.chain(*rounds)]
    counts = (parser.n_pages, parser.n_zero_pages, parser.n_xbzrle_pages, parser.n_parts)
    assert counts == (*map(forms.count, (FULL, ZERO, XBZRLE)), len(rounds) - 1)


@settings(max_examples=10)
@given(rounds=ROUNDS)
def test_byte_by_byte(rounds: list[list[Record]]) -> None:
    """Neither fails nor is done before its last byte: every prefix is a stream that goes on."""
    whole = stream(BLOCKS, rounds)
    parser = RamStream()
    for at in range(len(whole) - 1):
        assert parser.feed(whole[at : at + 1]) is None
    assert not parser.done
    assert parser.feed(whole[-1:] + TAIL) == 1
    assert state(parser) == state(fed(whole)[0])


def test_pieces_of_no_bytes_and_of_any_kind() -> None:
    whole = stream(BLOCKS, [[Record(RAM, 1)]])
    parser = RamStream()
    assert parser.feed(b"") is None
    piece = bytearray(whole[:100])
    assert parser.feed(piece) is None
    piece.clear()  # nothing holds on to it
    assert parser.feed(memoryview(whole)[100:]) == len(whole) - 100
    assert [parser.feed(TAIL), parser.feed(TAIL)] == [0, 0]


@pytest.mark.parametrize("bits", [None, 10, 12, 14, 16])
def test_sizes_of_pages(bits: int | None) -> None:
    page_bytes = 1 << (bits or 12)
    rounds = [[Record("m", 2), Record("m", 0, ZERO)], [Record("m", 3, XBZRLE, 5)]]
    parser, held = fed(stream([("m", 4 * page_bytes)], rounds, bits=bits), range(0, 9000, 700))
    assert (held is not None, parser.page_bytes) == (True, page_bytes)
    assert marked(parser) == {"m": [0, 2, 3]}


def test_marks_that_were_cleared_come_back() -> None:
    whole = HEADER + configuration() + start(block_list(BLOCKS) + END_OF_DATA)
    parser = RamStream()
    parser.feed(whole)
    for pages in ([1, 2], [2, 5], []):
        (data,) = streams.records([[Record(RAM, page) for page in pages]])
        parser.feed(part(data))
        assert marked(parser)[RAM] == pages
        for marks in parser.marks:
            marks[:] = 0


def test_the_guest_stops_with_the_end_of_ram() -> None:
    whole = stream(BLOCKS, [[Record(RAM, 1)], [Record(RAM, 2)]])
    at = whole.rindex(b"\x03" + number(streams.RAM_ID, 4))
    parser = RamStream()
    parser.feed(whole[: at + 4])
    assert (parser.in_ram_end, parser.switchover_seen) == (False, True)
    parser.feed(whole[at + 4 : at + 5])
    assert parser.in_ram_end


def test_configuration() -> None:
    uuid = subsection("uuid", bytes(16))
    begin = HEADER + configuration(page_bits(14), uuid, capabilities("xbzrle", "return-path"))
    parser, _ = fed(begin + start(block_list([(RAM, 1 << 14)]) + END_OF_DATA) + end())
    assert parser.capabilities == {"xbzrle", "return-path"}
    assert (parser.page_bytes, parser.done) == (1 << 14, True)


def test_names_of_any_bytes() -> None:
    strange = [b"\xff", b"\xfe", b"", b"\x00" * 255, "\udcff".encode("utf-8", "surrogatepass")]
    listed = b"".join(number(len(one), 1) + one + number(PAGE, 8) for one in strange)
    data = number(len(strange) * PAGE | streams.LIST, 8) + listed
    pages = b"".join(number(ZERO, 8) + number(len(one), 1) + one + b"\0" for one in strange)
    parser, _ = fed(HEADER + start(data + END_OF_DATA) + end(pages + END_OF_DATA))
    assert (len(set(parser.blocks)), [int(m[0]) for m in parser.marks]) == (5, [1] * 5)


# --- refused --------------------------------------------------------------------------------

BEGIN = HEADER + configuration(page_bits())
RUNNING = BEGIN + start(block_list(BLOCKS) + END_OF_DATA)


def in_ram(*words: int, rest: bytes = b"") -> bytes:
    return RUNNING + part(b"".join(number(word, 8) for word in words) + rest)


UNSUPPORTED = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01", "TLS", "tls-creds"),
    "a channel of multifd": (number(0x11223344, 4), "multifd", "multifd off"),
    "version 2": (b"QEVM" + number(2, 4), "version 2, not 3", "QEMU 8.0"),
    "mapped-ram": (HEADER + configuration(capabilities("mapped-ram")), "mapped-ram", "off"),
    "x-ignore-shared": (
        HEADER + configuration(page_bits(), capabilities("x-ignore-shared")),
        "x-ignore-shared",
        "migrate_set_capability x-ignore-shared off",
    ),
    "an unknown capability": (HEADER + configuration(capabilities("warp")), "warp", "warp off"),
    "an escape": (HEADER + configuration(capabilities("\x1b[2J")), "\\x1b[2J", "\\x1b[2J off"),
    "an unknown subsection": (HEADER + configuration(subsection("x", b"")), "tion/x", "update"),
    "a newer subsection": (
        HEADER + configuration(subsection("uuid", b"", version=2)),
        "version 2 of 'configuration/uuid'",
        "update",
    ),
    "post-copy": (BEGIN + command(3, bytes(16)), "postcopy-ram", "postcopy-ram off"),
    "advice on bitmaps": (BEGIN + command(3), "dirty-bitmaps", "dirty-bitmaps off"),
    "packaged": (BEGIN + command(8, bytes(4)), "postcopy-ram", "postcopy-ram off"),
    "bitmaps": (BEGIN + command(9, b"\3ram"), "postcopy-ram", "postcopy-ram off"),
    "COLO": (BEGIN + command(10), "x-colo", "x-colo off"),
    "an unknown command": (BEGIN + command(12), "command 12", "update"),
    "dirty bitmaps": (RUNNING + start(b"", of="dirty-bitmap"), "dirty-bitmaps", "bitmaps off"),
    "block migration": (RUNNING + start(b"", of="block"), "capability block", "block off"),
    "VFIO": (RUNNING + start(b"", of="0000:00:02.0/vfio"), "'0000:00:02.0/vfio'", "VFIO"),
    "an early device": (BEGIN + start(b"", 4, "virtio-mem-early"), "virtio-mem-early", "mem"),
    "a newer RAM": (BEGIN + start(b"", version=5), "version 5 of RAM", "update"),
    "multifd": (BEGIN + start(block_list(BLOCKS) + number(0x200, 8)), "multifd", "multifd off"),
    "no footers": (RUNNING[: -len(footer())] + part(), "no footers", "QEMU 2.4"),
    "RDMA": (in_ram(0x80), "RDMA", "rdma:"),
    "compression": (in_ram(0x100), "compress", "compress off"),
    "too much memory": (
        BEGIN + start(block_list([(RAM, 1 << 50)])),
        "1,125,899,906,842,624 bytes of memory",
        "smaller",
    ),
}

DAMAGED = {
    "another file": (b"\x7fELF\2\1", "begins with 7f 45 4c 46", 0),
    "an unknown record": (BEGIN + b"\x09", "type 0x09", len(BEGIN)),
    "a second configuration": (BEGIN + configuration(), "type 0x07", len(BEGIN)),
    "a late subsection": (RUNNING + page_bits(), "type 0x05", len(RUNNING)),
    "a long machine type": (HEADER + configuration(machine="x" * 256), "256 bytes", 8),
    "pages of 512 bytes": (HEADER + configuration(page_bits(9)), "2^9", None),
    "many capabilities": (
        HEADER + configuration(subsection("capabilities", number(1 << 31, 4))),
        "2,147,483,648 capabilities",
        None,
    ),
    "command 0": (BEGIN + command(0), "command 0", len(BEGIN)),
    "a ping of another length": (BEGIN + command(2, bytes(5)), "with 5 bytes", len(BEGIN)),
    "an early end": (RUNNING + b"\0", "end of the stream", len(RUNNING)),
    "an early description": (RUNNING + b"\6", "description", len(RUNNING)),
    "RAM twice": (RUNNING + start(END_OF_DATA), "second time", len(RUNNING)),
    "a part of nothing": (BEGIN + part(), "section 2 goes on", len(BEGIN)),
    "a part of something else": (RUNNING + part(section_id=3), "section 3", len(RUNNING)),
    "no list": (BEGIN + start(END_OF_DATA) + end(), "list", None),
    "a broken footer": (RUNNING[: -len(footer())] + b"\x7f", "0x7f in pl", len(RUNNING) - 5),
    "another's footer": (RUNNING[: -len(footer())] + footer(7), "section 7", len(RUNNING) - 5),
    "an old flag": (in_ram(0x01), "0x1, whose flags 0x1", len(RUNNING) + 5),
    "no flag": (in_ram(0x1000), "0x1000, whose flags 0x0", len(RUNNING) + 5),
    "two flags": (in_ram(FULL | ZERO), "flags 0xa", len(RUNNING) + 5),
    "an end elsewhere": (in_ram(PAGE | 0x10), "flags 0x10", len(RUNNING) + 5),
    "a page of no block": (in_ram(SAME | FULL), "there was none", len(RUNNING) + 5),
    "an unknown block": (in_ram(FULL, rest=name("x")), "'x'", len(RUNNING) + 5),
    "a page after its block": (
        in_ram(4 * PAGE | ZERO, rest=name("virt.flash0") + b"\0"),
        "0x4000 of 'virt.flash0', which has 0x4000",
        len(RUNNING) + 5,
    ),
    "the same, further on": (
        in_ram(ZERO, rest=name("virt.flash0") + b"\0" + number(4 * PAGE | SAME | ZERO, 8)),
        "0x4000 of 'virt.flash0', which has 0x4000",
        None,
    ),
    "a page of ones": (in_ram(ZERO, rest=name(RAM) + b"\1"), "0x01", len(RUNNING) + 5),
    "ones, further on": (
        in_ram(ZERO, rest=name(RAM) + b"\0" + number(SAME | ZERO, 8) + b"\1"),
        "0x01",
        None,
    ),
    "a long XBZRLE": (
        in_ram(XBZRLE, rest=name(RAM) + b"\1" + number(PAGE + 1, 2)),
        "4,097 bytes in encoding 1",
        None,
    ),
    "another encoding": (in_ram(XBZRLE, rest=name(RAM) + b"\2\0\0"), "encoding 2", None),
    "a second list": (in_ram(PAGE | streams.LIST), "second list", len(RUNNING) + 5),
    "two of one name": (BEGIN + start(block_list([("a", PAGE)] * 2)), "'a'", None),
    "a part of a page": (BEGIN + start(block_list([("a", PAGE + 1)], total=2 * PAGE)), "'a'", None),
    "a larger block": (BEGIN + start(block_list([("a", 2 * PAGE)], total=PAGE)), "of 0x1000", None),
    "many blocks": (
        BEGIN + start(block_list([(str(n), 0) for n in range(5000)], total=PAGE)),
        "4096 blocks",
        None,
    ),
    "an escape": (in_ram(FULL, rest=name("\x1b[2J")), "'\\x1b[2J'", None),
}


@pytest.mark.parametrize("which", UNSUPPORTED)
def test_what_is_not_understood(which: str) -> None:
    data, words, hint = UNSUPPORTED[which]
    for cuts in ((), range(len(data))):
        with pytest.raises(StreamUnsupportedError, match=re.escape(words)) as caught:
            fed(data, cuts)
        assert hint in str(caught.value.hint)
        assert isinstance(caught.value.details["offset"], int)


@pytest.mark.parametrize("which", DAMAGED)
def test_what_is_damaged(which: str) -> None:
    data, words, offset = DAMAGED[which]
    for cuts in ((), range(len(data))):
        with pytest.raises(StreamDamagedError, match=re.escape(words)) as caught:
            fed(data, cuts)
        found = caught.value.details["offset"]
        assert offset in (found, None)
        assert f"at byte {found:,}" in caught.value.message


def test_an_error_stays() -> None:
    parser = RamStream()
    with pytest.raises(StreamDamagedError) as first:
        parser.feed(b"not QEMU's")
    with pytest.raises(StreamDamagedError) as second:
        parser.feed(stream(BLOCKS, [[]]))
    assert first.value is second.value


def test_no_memory_for_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("numpy.zeros", none)
    with pytest.raises(NoMemoryError, match="21 pages"):
        fed(RUNNING)


def test_a_limit_of_ones_own() -> None:
    parser = RamStream(most_memory_bytes=20 * PAGE)
    with pytest.raises(StreamUnsupportedError, match="accepts 81,920"):
        parser.feed(RUNNING)


# --- hostile --------------------------------------------------------------------------------


def outcome(data: bytes, cuts: Sequence[int] = ()) -> object:
    try:
        parser, held = fed(data, cuts)
    except (StreamDamagedError, StreamUnsupportedError) as error:
        return error.id, error.message
    return held, state(parser)


@given(st.integers(0, 1 << 30), st.lists(st.integers(0, 1 << 20), max_size=5))
def test_any_change_ends_alike(seed: int, cuts: list[int]) -> None:
    """In an error or not, and the same however it is cut."""
    rng = random.Random(seed)  # noqa: S311
    data = streams.changed(streams.random_stream(rng), rng)
    assert outcome(data) == outcome(data, cuts)


@given(st.binary(max_size=300), st.sampled_from([b"", HEADER, BEGIN, RUNNING]))
def test_garbage(garbage: bytes, begin: bytes) -> None:
    assert outcome(begin + garbage) == outcome(begin + garbage, range(400))


@pytest.mark.parametrize(
    "begin",
    [
        BEGIN + start(number((16 << 40) | streams.LIST, 8))[: -len(footer())],
        RUNNING + number(2, 1) + number(streams.RAM_ID, 4) + number(ZERO, 8) + name(RAM) + b"\0",
        RUNNING + number(2, 1) + number(streams.RAM_ID, 4),
    ],
    ids=["list", "pages", "section"],
)
@pytest.mark.parametrize("more", [b"\xff\xff" + bytes(300), b"\0", number(SAME | FULL, 8)])
def test_memory_is_bounded(begin: bytes, more: bytes) -> None:
    """Whatever comes after, and for how long: less than a megabyte is kept."""
    parser = RamStream()
    tracemalloc.start()
    try:
        parser.feed(begin)
        for _ in range(2000):
            parser.feed(more * (4096 // len(more)))
    except MtetoolError:
        pass
    finally:
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 2 << 20, (kept, most)


def test_a_huge_guest_costs_nothing_at_first() -> None:
    """Marks take up memory where they are set; the host need not have them all."""
    size = 8 << 40
    parser = RamStream()
    before = _resident_bytes()
    parser.feed(BEGIN + start(block_list([(RAM, size)]) + END_OF_DATA))
    parser.feed(part(number(size - PAGE | ZERO, 8) + name(RAM) + b"\0" + END_OF_DATA))
    assert parser.marks[0][-1] == 1
    assert _resident_bytes() - before < 16 << 20


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096
