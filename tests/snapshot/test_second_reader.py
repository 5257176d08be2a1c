"""mtetool and a reader made from mtesnap(5) alone agree, on sound snapshots and on others."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from xxhash import xxh3_64_intdigest

from mtetool.errors import (
    DamagedError,
    NotASnapshotError,
    SnapshotError,
    TruncatedError,
    UnknownVersionError,
)
from mtetool.guest import Missing
from mtetool.snapshot.model import Footer
from mtetool.snapshot.reader import Piece
from mtetool.tags import as_array
from tests.snapshot.forge import (
    BASE,
    PAGE,
    read_all,
    small_forge,
    small_snapshot,
)
from tests.snapshot.second_reader import RefusedError, read
from tests.snapshot.test_round_trip import OPS, Op, apply

GOLDEN = Path(__file__).parent / "golden"
# Not no-tags: it covers 4 GiB, and the second reader keeps every page.
FILES = [
    GOLDEN / f"v1-{name}.mtesnap"
    for name in ("64k-delta", "ancillary", "delta", "empty", "every-kind", "runs")
]

VERDICTS: dict[str, type[SnapshotError]] = {
    "not a snapshot": NotASnapshotError,
    "unknown version": UnknownVersionError,
    "truncated": TruncatedError,
    "damaged": DamagedError,
}

Record = tuple[bytes, bytes, bytes]
"""Kind, head, payload."""


def pages_of(pieces: list[Piece | Missing], page_bytes: int) -> dict[int, bytes | None]:
    """The packed tags of each page, by its last record; None if they are missing."""
    pages: dict[int, bytes | None] = {}
    for piece in pieces:
        size = page_bytes // 16
        for i, at in enumerate(range(piece.ipa, piece.end, page_bytes)):
            pages[at] = None
            if isinstance(piece, Piece):
                tags = (
                    as_array(piece.tags())
                    if piece.fill is None
                    else np.full(piece.n_granules, piece.fill)
                )
                part = tags[i * size : (i + 1) * size].astype(np.uint8)
                pages[at] = (part[0::2] | part[1::2] << 4).tobytes()
    return pages


def agree(data: bytes) -> str:
    """Check that both read the same, or both refuse it; return the second reader's verdict."""
    try:
        found = read(data)
    except RefusedError as error:
        with pytest.raises(SnapshotError):
            read_all(data)
        return error.verdict
    reader, pieces = read_all(data)
    about, done = reader.header, found.done
    assert found.head["id"] == about.snapshot_id
    assert found.head["scope"] == [[extent.ipa, extent.size_bytes] for extent in about.scope]
    keys = ("records", "granules", "tagged", "tagged_pages", "missing", "consistent")
    values = [*(done[key] for key in keys), done.get("changed")]
    assert Footer(*values) == reader.footer  # type: ignore[arg-type]
    assert [(p.ipa, p.size_bytes // 16) for p in pieces] == [(i, n) for _, i, n in found.log]
    assert pages_of(pieces, about.page_size_bytes) == found.pages
    return "sound"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files(path: Path) -> None:
    assert agree(path.read_bytes()) == "sound"


@settings(max_examples=60, deadline=None)
@given(OPS)
def test_whatever_the_writer_writes(ops: list[Op]) -> None:
    assert agree(apply(ops)[0]) == "sound"


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (b"", "not a snapshot"),
        (b"\x1f\x8b" + bytes(50), "not a snapshot"),
        (small_snapshot()[:-1], "truncated"),
        (small_snapshot()[:7], "truncated"),
        (small_snapshot() + b"\0", "damaged"),
        (small_snapshot().replace(b"\n\1", b"\n\2", 1), "unknown version"),
        (small_forge(1).fill(BASE, 1, 0, later=1).end(), "unknown version"),
        (small_forge(1).record(b"XTRA", {}).fill(BASE, 1).end(), "unknown version"),
        (small_forge(2).fill(BASE, 1).end(), "damaged"),
        (small_forge(1).fill(BASE, 1).fill(BASE + PAGE, 1).end(), "damaged"),
    ],
)
def test_the_same_word_for_what_is_wrong(data: bytes, verdict: str) -> None:
    assert agree(data) == verdict
    with pytest.raises(VERDICTS[verdict]):
        read_all(data)


# --- snapshots with a fault in them, and every checksum right -------------------------------------

VALUES: list[object] = [
    *(None, True, 0, 1, 2, 15, 16, -1, 256, 512, 4096, 65536, BASE, BASE + PAGE, 1 << 31, 1 << 32),
    *((1 << 63), (1 << 64) - PAGE, 1.5, "", "x", "ram", b"", [], {}, [[0, PAGE]], "a" * 4097),
]
KINDS = [b"TAGS", b"MISS", b"INDX", b"DONE", b"HEAD", b"note", b"NOTE"]


def cut_up(data: bytes) -> list[Record]:
    """The records of a sound snapshot."""
    at, records = 16, []
    while at < len(data) - 16:
        kind, n_head, n_payload = struct.unpack_from("<4sII", data, at)
        middle, end = at + 24 + n_head, at + 24 + n_head + n_payload
        records.append((kind, data[at + 24 : middle], data[middle:end]))
        at = end
    return records


def sealed(records: list[Record]) -> bytes:
    """A snapshot of these records with numbers, checksums, index and digest made to match."""
    out = struct.pack("<8sII", b"\x89MTESNP\n", 1, 0)
    checksums, entries, index_at, n_index, done_at = b"", b"", None, 0, 0
    for number, (kind, head, payload) in enumerate(records):
        start = len(out)
        if kind == b"INDX":
            index_at, n_index = (start if index_at is None else index_at), n_index + 1
            payload = entries
        if kind == b"DONE":
            done_at = start
            digest = xxh3_64_intdigest(checksums)
            where = start if index_at is None else index_at
            head = changed(head, records=number, index=where, index_records=n_index, digest=digest)
        preamble = struct.pack("<4sIII", kind, len(head), len(payload), number)
        covered = (out if number == 0 else b"") + preamble + head + payload
        checksum = struct.pack("<Q", xxh3_64_intdigest(covered))
        out += preamble + checksum + head + payload
        checksums += checksum
        if kind in (b"TAGS", b"MISS"):
            entries += entry(start, kind, head, len(out) - start)
    return out + struct.pack("<Q8s", done_at, b"\x89MTEEND\n")


def changed(head: bytes, **values: object) -> bytes:
    """The head with other values, if it is a map at all."""
    try:
        return bytes(msgpack.packb({**msgpack.unpackb(head), **values}))
    except (ValueError, TypeError):
        return head


def entry(start: int, kind: bytes, head: bytes, length: int) -> bytes:
    """The entry of a record in the index, if its head makes one possible."""
    try:
        about = msgpack.unpackb(head)
        granules = about["granules"] if kind == b"TAGS" else about["size"] // 16
        return struct.pack("<QQQ4sI", start, about["ipa"], granules, kind, length)
    except (ValueError, TypeError, KeyError, struct.error):
        return b""


def with_a_fault_in(head: bytes, rng: random.Random) -> bytes:
    """The head with one value changed."""
    about = msgpack.unpackb(head)
    key = rng.choice(list(about))
    value = about[key]
    about[key] = rng.choice(VALUES)
    if type(value) is int and rng.random() < 0.5:
        about[key] = max(0, min(value + rng.choice([-PAGE, PAGE, 1, -1, 256, -256]), (1 << 64) - 1))
    return bytes(msgpack.packb(about))


def with_a_fault(records: list[Record], rng: random.Random) -> list[Record]:
    """The records, with one thing in them changed."""
    result = list(records)
    at = rng.randrange(len(result))
    kind, head, payload = result[at]
    what = rng.randrange(10)
    if what < 5 and kind.isupper():
        result[at] = (kind, with_a_fault_in(head, rng), payload)
    elif what <= 5:
        broken = bytearray(payload or b"x")
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        result[at] = (kind, head, bytes(broken))
    elif what == 6:
        result.insert(at, rng.choice(records))
    elif what == 7:
        del result[at]
    elif what == 8:
        other = rng.randrange(len(result))
        result[at], result[other] = result[other], result[at]
    else:
        result[at] = (rng.choice(KINDS), head, payload)
    return result


def test_resealed_is_the_same() -> None:
    for path in FILES:
        assert read(sealed(cut_up(path.read_bytes()))) == read(path.read_bytes())


def test_faults_that_no_checksum_shows() -> None:
    rng = random.Random(1)  # noqa: S311
    seeds = [cut_up(path.read_bytes()) for path in FILES if "empty" not in path.stem]
    verdicts = set()
    for _ in range(1500):
        verdicts.add(agree(sealed(with_a_fault(rng.choice(seeds), rng))))
    assert verdicts == {"sound", *VERDICTS} - {"not a snapshot"}
