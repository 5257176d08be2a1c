"""Only a whole, sound snapshot passes for one; errors name what is wrong with others."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
from collections.abc import Mapping
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import pytest
import zstandard

from mtetool.errors import (
    DamagedError,
    HostIoError,
    NoSuchFileError,
    NotASnapshotError,
    SnapshotError,
    TruncatedError,
    UnknownVersionError,
    UsageError,
)
from mtetool.guest import Extent
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.summary import read_summary
from tests.snapshot.forge import (
    BASE,
    PAGE,
    PAGE_GRANULES,
    Forge,
    head_map,
    header,
    random_tags,
    read_all,
    read_range,
    refused,
    small_forge,
    small_snapshot,
)

# --- any change of any byte -----------------------------------------------------------------


def test_every_flipped_bit_is_noticed() -> None:
    data = bytearray(small_snapshot())
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(SnapshotError):
                read_all(bytes(data))
            data[at] ^= 1 << bit
    read_all(bytes(data))


def test_every_flipped_bit_leaves_the_summary_right_or_is_noticed(tmp_path: Path) -> None:
    data = bytearray(small_snapshot())
    path = tmp_path / "flipped"
    path.write_bytes(data)
    right = read_summary(str(path))
    unnoticed = 0
    with path.open("r+b", buffering=0) as file:
        for at in range(len(data)):
            for bit in range(8):
                file.seek(at)
                file.write(bytes([data[at] ^ 1 << bit]))
                try:
                    assert read_summary(str(path)) == right
                    unnoticed += 1
                except SnapshotError:
                    pass
            file.seek(at)
            file.write(data[at : at + 1])
    # Only bits of tag records go unnoticed, which a summary does not read.
    records = [piece for piece in read_all(bytes(data))[1] if isinstance(piece, Piece)]
    assert unnoticed <= 8 * sum(piece.stored_bytes for piece in records)


def test_every_flipped_bit_is_noticed_where_a_range_is_read(tmp_path: Path) -> None:
    data = bytearray(small_snapshot())
    path = tmp_path / "flipped"
    path.write_bytes(data)
    wanted = [Extent(BASE, 2 * PAGE)]
    right = list(read_range(str(path), wanted))
    for at in range(0, len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            assert list(read_range(str(path), wanted)) == right
        except SnapshotError:
            continue


def test_a_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    data = small_snapshot()
    path = tmp_path / "cut"
    for length in range(1, len(data)):
        refused(data[:length], TruncatedError)
        path.write_bytes(data[:length])
        with pytest.raises(TruncatedError):
            read_summary(str(path))
        with pytest.raises(TruncatedError):
            list(read_range(str(path), [Extent(BASE, PAGE)]))


def test_the_end_is_where_the_message_says() -> None:
    data = small_snapshot()
    refused(data + b"junk", DamagedError, f"which is {len(data)} bytes long")


@pytest.mark.parametrize(
    "junk", [b"\0", b"\n", b"\0" * 4096, small_snapshot(), small_snapshot()[-16:]]
)
def test_junk_behind_the_end(tmp_path: Path, junk: bytes) -> None:
    data = small_snapshot() + junk
    refused(data, DamagedError, "after the end")
    path = tmp_path / "junk"
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        read_summary(str(path))


def records_of(data: bytes) -> list[bytes]:
    """A snapshot cut into its prologue, its records and its trailer."""
    parts, at = [data[:16]], 16
    while at < len(data) - 16:
        head_bytes, payload_bytes = struct.unpack_from("<II", data, at + 4)
        parts.append(data[at : at + 24 + head_bytes + payload_bytes])
        at += len(parts[-1])
    return [*parts, data[at:]]


def test_records_lost_repeated_or_moved() -> None:
    parts = records_of(small_snapshot())
    assert b"".join(parts) == small_snapshot()
    for i in range(1, len(parts) - 1):
        refused(b"".join(parts[:i] + parts[i + 1 :]), SnapshotError)
        refused(b"".join([*parts[: i + 1], *parts[i:]]), SnapshotError)
        if i + 2 < len(parts):
            swapped = [*parts[:i], parts[i + 1], parts[i], *parts[i + 2 :]]
            refused(b"".join(swapped), SnapshotError)


def test_a_record_with_another_number() -> None:
    for number in (0, 1, 3, 0xFFFFFFFF):
        head = {"ipa": BASE + 2 * PAGE, "size": 2 * PAGE, "errno": None, "reason": ""}
        forge = small_forge().fill(BASE, 2).record(b"MISS", head, sequence=number)
        refused(forge.end(), DamagedError, f"number {number} where number 2 belongs")


def test_records_of_another_snapshot_do_not_fit() -> None:
    ours = records_of(small_forge().fill(BASE, 4, 1).end())
    theirs = records_of(small_forge().fill(BASE, 4, 2).end())
    # The number and the checksum are right: only the end's digest shows it.
    refused(b"".join([*ours[:2], theirs[2], *ours[3:]]), DamagedError, "totals")


# --- something else ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "empty"),
        (gzip.compress(small_snapshot()), "gzip"),
        (zstandard.compress(small_snapshot()), "zstd"),
        (lzma.compress(small_snapshot()), "xz"),
        (b"# a script\n", "text"),
        ("ä text in German".encode(), "text"),
        (b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0", "ELF"),
        (b"QEVM\0\0\0\3\0\0\0\0\0\0\0\0", "QEMU migration"),
        (bytes(100), "some other file"),
        (small_snapshot().replace(b"\n", b"\r\n"), "transferred as text"),
    ],
)
def test_something_else_is_named(tmp_path: Path, data: bytes, named: str) -> None:
    refused(data, NotASnapshotError, named)
    path = tmp_path / "else"
    path.write_bytes(data)
    for read in (read_summary, lambda name: read_range(name, [])):
        with pytest.raises(NotASnapshotError, match=named):
            read(str(path))


def test_a_directory_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(NotASnapshotError, match="directory"):
        read_summary(str(tmp_path))


@pytest.mark.parametrize("name", ["absent", "file/absent"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoSuchFileError):
        read_summary(str(tmp_path / name))


def test_a_terminal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(UsageError, match="terminal"):
        read_summary("-")


def test_a_failing_disk_is_no_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 100:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(HostIoError, match="Input/output error"):
        list(SnapshotReader(Failing(small_snapshot()), "test"))


# --- versions and features --------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 3, 1 << 31])
def test_another_version_names_both(version: int) -> None:
    forge = Forge(version=version).fill(0, 4).fill(BASE, 8)
    refused(forge.end(), UnknownVersionError, f"version {version};.* version 1")


@pytest.mark.parametrize("bit", range(32))
def test_any_flag_is_unknown(bit: int) -> None:
    refused(Forge(flags=1 << bit).end(), UnknownVersionError)


def test_an_unknown_kind_matters_unless_it_is_lower_case(tmp_path: Path) -> None:
    for kind in (b"XTRA", b"Abcd", b"\0\0\0\0", b"1abc", b"\xffabc"):
        refused(small_forge().record(kind, {}).fill(BASE, 4).end(), UnknownVersionError)
    sound = small_forge().record(b"note", {"anything": [1, {}]}, b"payload").fill(BASE, 4).end()
    _, pieces = read_all(sound)
    assert [piece.ipa for piece in pieces] == [BASE]
    path = tmp_path / "ancillary"
    path.write_bytes(sound)
    assert read_summary(str(path)).footer.records == 4
    # Ignored, but still checked.
    refused(sound.replace(b"payload", b"Payload"), DamagedError, "checksum")


def test_unknown_keys_matter_unless_they_begin_with_x() -> None:
    slot = {"id": 0, "ipa": 0, "size": PAGE, "readonly": None, "kind": "ram"}
    about = header(4)
    for extra in ("later", "X-later", "x", ""):
        for data in (
            Forge(head_map(about, **{extra: 1})).fill(BASE, 4).end(),
            Forge(head_map(about, memslots=[{**slot, extra: 1}])).fill(BASE, 4).end(),
            small_forge().fill(BASE, 4, **{extra: 1}).end(),
            small_forge().tags(BASE, random_tags(4), **{extra: 1}).end(),
            small_forge().miss(BASE, 4, **{extra: 1}).end(),
            small_forge().fill(BASE, 4).end(**{extra: 1}),
        ):
            refused(data, UnknownVersionError, "feature")
    forge = Forge(head_map(about, memslots=[{**slot, "x-a": 1}], **{"x-b": [{}]}))
    forge.fill(BASE, 2, **{"x-c": None}).miss(BASE + 2 * PAGE, 2, **{"x-d": b"\0"})
    read_all(forge.end(**{"x-e": -1}))


def test_an_unknown_encoding() -> None:
    head = {"ipa": BASE, "granules": 4 * PAGE_GRANULES, "enc": 3}
    refused(small_forge().record(b"TAGS", head, b"1").end(), UnknownVersionError, "encoding")


# --- heads ------------------------------------------------------------------------------------

BAD_MAPS: list[bytes] = [
    b"",
    b"\xc0",
    b"\x90",
    b"\x81",
    b"\xc1",
    b"\x80\x80",
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 60_000,
    b"\x81\xa1a" * 20_000,
    b"\x81\x01\x02",
    b"\x81\x90\x02",
    b"\x81\xa2\xff\xfe\x01",
    b"\x81\xc4\x01a\x01",
    b"\x82\xa3ipa\x00\xa3ipa\x00",
]


@pytest.mark.parametrize("bad", BAD_MAPS, ids=range(len(BAD_MAPS)))
def test_what_is_no_map(bad: bytes) -> None:
    for kind in (b"TAGS", b"MISS", b"INDX", b"DONE"):
        refused(small_forge().record(kind, bad).data, DamagedError)
    refused(Forge(bad).data, DamagedError)


def with_duplicate(values: Mapping[str, object], key: str) -> bytes:
    """The map with a key twice, the second time with the same value."""
    packer = msgpack.Packer()
    parts = [packer.pack_map_header(len(values) + 1)]
    for name, value in (*values.items(), (key, values[key])):
        parts += [packer.pack(name), packer.pack(value)]
    return b"".join(parts)


def test_a_key_twice() -> None:
    values = {"ipa": BASE, "granules": 4 * PAGE_GRANULES, "enc": 0, "tag": 0}
    for key in values:
        refused(small_forge().record(b"TAGS", with_duplicate(values, key)).data, DamagedError, key)
    refused(Forge(with_duplicate(head_map(), "scope")).data, DamagedError, "twice")


WRONG: list[object] = [None, True, -1, 1 << 63, 1.0, "1", b"1", [], {}, 8]


@pytest.mark.parametrize("key", ["ipa", "granules", "enc", "tag"])
def test_wrong_values_in_a_fill(key: str) -> None:
    for value in WRONG:
        if (key, value) == ("tag", 8):
            continue
        data = small_forge().fill(BASE, 4, **{key: value}).end()
        refused(data, SnapshotError)
    head: dict[str, object] = {"ipa": BASE, "granules": 4 * PAGE_GRANULES, "enc": 0, "tag": 0}
    del head[key]
    refused(small_forge().record(b"TAGS", head).end(), DamagedError, f"no '{key}'")


@pytest.mark.parametrize("key", ["ipa", "granules", "tagged", "tagged_pages", "enc"])
def test_wrong_values_in_packed_tags(key: str) -> None:
    for value in WRONG:
        refused(small_forge().tags(BASE, random_tags(4), **{key: value}).end(), SnapshotError)


@pytest.mark.parametrize("key", ["ipa", "size", "errno", "reason"])
def test_wrong_values_in_missing(key: str) -> None:
    for value in WRONG:
        if key == "errno" and value in (None, 8) and value is not True:
            continue
        if key == "reason" and value == "1":
            continue
        refused(small_forge().miss(BASE, 4, **{key: value}).end(), DamagedError)
    refused(small_forge().miss(BASE, 4, reason="x" * 4097).end(), DamagedError)


@pytest.mark.parametrize(
    "key",
    [
        "records",
        "granules",
        "tagged",
        "tagged_pages",
        "missing",
        "consistent",
        "index",
        "index_records",
        "digest",
    ],
)
def test_wrong_values_in_the_end(tmp_path: Path, key: str) -> None:
    path = tmp_path / "end"
    for value in WRONG:
        if key == "consistent" and (value is None or value is True):
            continue
        data = small_forge().fill(BASE, 4, 1).end(**{key: value})
        refused(data, DamagedError)
        path.write_bytes(data)
        # A summary neither counts tags nor reads the checksums of their records.
        if key not in ("tagged", "tagged_pages", "digest"):
            with pytest.raises(DamagedError):
                read_summary(str(path))


HEAD_KEYS = [
    ("id", ["", "z" * 32, "A" * 32, "0" * 31, None, 1, b"0" * 32]),
    ("base", ["", "0" * 33, 1, False]),
    ("page_size", [0, 1, 2048, 8192, 1 << 20, True, None, "4096", -4096]),
    ("granule_size", [0, 8, 32, None, True]),
    ("chunk_granules", [0, 1, 255, 257, (32 << 20) + 256, 1 << 40, True, None]),
    ("source", [None, 1, "x" * 4097]),
    ("created", [None]),
    ("tool", [None]),
    ("kernel", [None]),
    ("machine", [None]),
    ("vmm", [1, b""]),
    ("name", [1, b""]),
    ("paused", [0, 1, "true"]),
    (
        "scope",
        [
            None,
            {},
            [BASE, PAGE],
            [[BASE]],
            [[BASE, PAGE, 0]],
            [[BASE, 0]],
            [[BASE, -PAGE]],
            [[BASE, True]],
            [[BASE, 100]],
            [[BASE + 16, PAGE]],
            [[BASE, 2 * PAGE], [BASE + PAGE, PAGE]],
            [[BASE, PAGE], [BASE, PAGE]],
            [[BASE + PAGE, PAGE], [BASE, PAGE]],
            [[(1 << 64) - PAGE, 2 * PAGE]],
            [[0, (1 << 64) - PAGE], [(1 << 64) - PAGE, PAGE], [0, PAGE]],
        ],
    ),
]


@pytest.mark.parametrize(("key", "values"), HEAD_KEYS, ids=[key for key, _ in HEAD_KEYS])
def test_wrong_values_in_the_header(key: str, values: list[object]) -> None:
    for value in values:
        refused(Forge(head_map(**{key: value})).data, DamagedError)
    head = head_map()
    del head[key]
    refused(Forge(head).data, DamagedError, f"no '{key}'")


def test_wrong_memslots() -> None:
    good = {"id": 1, "ipa": BASE, "size": PAGE, "readonly": False, "kind": "ram"}
    bad: list[object] = [
        None,
        [],
        {**good, "kind": "disk"},
        {**good, "kind": 1},
        {**good, "readonly": 0},
    ]
    bad += [{**good, "size": 0}, {**good, "size": 100}, {**good, "ipa": 1}, {**good, "id": -1}]
    bad += [{**good, "id": True}, {**good, "ipa": (1 << 64) - PAGE, "size": 2 * PAGE}]
    for slot in bad:
        refused(Forge(head_map(memslots=[slot])).data, DamagedError, "memslot")
    refused(Forge(head_map(memslots=[good, good])).data, DamagedError, "overlaps")


def test_the_header_comes_first_and_once() -> None:
    forge = Forge()
    forge.data, forge.records = forge.data[:16], 0
    forge.record(b"MISS", {}, covered=forge.data)
    refused(forge.data, DamagedError, "does not start")
    refused(small_forge().record(b"HEAD", head_map()).end(), DamagedError, "second header")


# --- coverage ---------------------------------------------------------------------------------


def test_pages_that_nobody_speaks_of() -> None:
    for page in range(4):
        forge = small_forge()
        for other in range(4):
            if other != page:
                forge.fill(BASE + other * PAGE, 1)
        refused(forge.end(), DamagedError, f"no record covers {BASE + page * PAGE:#x}:0x1000")
    refused(small_forge().end(), DamagedError, "no record covers")


@pytest.mark.parametrize(
    ("ipa", "n_pages"),
    [(BASE - PAGE, 1), (BASE + 4 * PAGE, 1), (BASE, 5), (BASE - PAGE, 6), (BASE + 16, 1), (0, 1)],
)
def test_records_outside_the_scope(tmp_path: Path, ipa: int, n_pages: int) -> None:
    path = tmp_path / "outside"
    for forge in (
        small_forge().fill(BASE, 4).fill(ipa, n_pages),
        small_forge().fill(BASE, 4).miss(ipa, n_pages),
    ):
        data = forge.end()
        refused(data, DamagedError)
        path.write_bytes(data)
        with pytest.raises(DamagedError):
            read_summary(str(path))


def test_records_in_a_hole_of_the_scope() -> None:
    scope = [[BASE, PAGE], [BASE + 2 * PAGE, PAGE]]
    forge = Forge(head_map(header(4), scope=scope)).fill(BASE, 3)
    refused(forge.end(), DamagedError, "not inside")
