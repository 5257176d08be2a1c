"""Snapshots changed as an attacker with mtesnap(5) would change them.

Checksums cover every byte of a snapshot, so blind changes would test only those. This module
takes a file apart, changes its records, and puts it together again with all checksums, counts
and the index made right, unless they are what is changed.
"""

from __future__ import annotations

import copy
import random
import struct
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]
import zstandard
from xxhash import xxh3_64_intdigest

_PREAMBLE = struct.Struct("<4sIII")
# How many of the two tags in a byte are not 0.
_TAGS_IN_BYTE = bytes((byte & 15 != 0) + (byte >> 4 != 0) for byte in range(256))
_KINDS = (b"HEAD", b"TAGS", b"MISS", b"INDX", b"DONE", b"note", b"NOTE", b"\0\0\0\0")
_NUMBERS = (
    *(0, 1, 2, 15, 16, 17, 255, 256, 4095, 4096, 8192, 65535, 65536, 1 << 20, 1 << 24),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 47, 1 << 60, (1 << 63) - 1, 1 << 63),
    *((1 << 64) - 4096, (1 << 64) - 1, -1, -(1 << 63)),
)
_ODD: tuple[object, ...] = (
    *(
        None,
        True,
        False,
        0.0,
        -0.0,
        1e308,
        "",
        "\0",
        "\x1b[31m[/red]",
        "a" * 5000,
        b"",
        b"\xff" * 9,
    ),
    *(
        [],
        {},
        [[]],
        {"": 0},
        msgpack.ExtType(5, b"x"),
        msgpack.Timestamp(0),
        "\u202e",
        "ram",
        "rom",
    ),
)


@dataclass
class Part:
    """A record: `head` as msgpack decodes it, or bytes that it cannot decode."""

    kind: bytes
    head: object
    payload: bytes


@dataclass
class Snapshot:
    """A file taken apart; the index and the end record are rebuilt from the rest."""

    prologue: bytes
    parts: list[Part]


def take_apart(data: bytes) -> Snapshot:
    """Read as many records as there are, without any checks."""
    parts, at = [], 16
    while at + 24 <= len(data):
        kind, n_head, n_payload, _ = _PREAMBLE.unpack_from(data, at)
        end = at + 24 + n_head + n_payload
        if end > len(data):
            break
        head = data[at + 24 : at + 24 + n_head]
        parts.append(Part(kind, _unpacked(head), data[end - n_payload : end]))
        at = end
    return Snapshot(data[:16].ljust(16, b"\0"), parts)


def _unpacked(head: bytes) -> object:
    try:
        return msgpack.unpackb(head, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        return head


def _packed(head: object) -> bytes:
    if isinstance(head, bytes):
        return head
    try:
        return bytes(msgpack.packb(head))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return b"\xc1"


def put_together(snapshot: Snapshot, *, mend: bool = True) -> bytes:
    """Build the file, all checksums right; `mend` makes index, totals and end right too."""
    parts = [part for part in snapshot.parts if not mend or part.kind not in (b"INDX", b"DONE")]
    out, checksums, index = bytearray(snapshot.prologue), bytearray(), bytearray()
    number = 0

    def add(kind: bytes, head: object, payload: bytes) -> int:
        nonlocal number
        start, packed = len(out), _packed(head)
        opening = _PREAMBLE.pack(kind, len(packed), len(payload), number)
        first = bytes(snapshot.prologue) if number == 0 else b""
        checksum = struct.pack("<Q", xxh3_64_intdigest(first + opening + packed + payload))
        out.extend(opening + checksum + packed + payload)
        if kind != b"DONE":
            checksums.extend(checksum)
        number += 1
        return start

    for part in parts:
        start = add(part.kind, part.head, part.payload)
        entry = _entry(part)
        if entry is not None:
            index.extend(struct.pack("<QQQ4sI", start, *entry, part.kind, len(out) - start))
    if mend:
        end = len(out)
        if index:
            add(b"INDX", {"entries": len(index) // 32}, bytes(index))
        done = _totals(parts, number)
        done.update(index=end, index_records=int(bool(index)), digest=xxh3_64_intdigest(checksums))
        end = add(b"DONE", done, b"")
        out.extend(struct.pack("<Q8s", end, b"\x89MTEEND\n"))
    return bytes(out)


def _entry(part: Part) -> tuple[int, int] | None:
    """The address and granules that the index gives for a record."""
    head = part.head
    if part.kind not in (b"TAGS", b"MISS") or not isinstance(head, dict):
        return None
    size = head.get("granules") if part.kind == b"TAGS" else head.get("size")
    ipa = head.get("ipa")
    if type(size) is not int or type(ipa) is not int:
        return None
    granules = size if part.kind == b"TAGS" else size // 16
    return ipa % (1 << 64), granules % (1 << 64)


def _totals(parts: list[Part], records: int) -> dict[str, object]:
    """What the end record should say; wrong where records overlap in odd ways."""
    granules = tagged = pages = 0
    missing: dict[int, bool] = {}
    page = 4096
    first = parts[0].head if parts else None
    if isinstance(first, dict) and first.get("page_size") in (4096, 16384, 65536):
        page = first["page_size"]
    for part in parts:
        entry = _entry(part)
        if entry is None or not isinstance(part.head, dict):
            continue
        if part.kind == b"TAGS":
            granules += entry[1]
            found = _tagged(part, page // 16)
            tagged, pages = tagged + found[0], pages + found[1]
        for at in range(entry[0], entry[0] + min(entry[1] * 16, 64 * page), page):
            missing[at] = part.kind == b"MISS"
    return {
        "records": records,
        "granules": granules % (1 << 64),
        "tagged": tagged % (1 << 64),
        "tagged_pages": pages % (1 << 64),
        "missing": page * sum(missing.values()),
        "consistent": None,
    }


def _tagged(part: Part, page_granules: int) -> tuple[int, int]:
    head = part.head
    assert isinstance(head, dict)
    if head.get("enc") == 0:
        count = head["granules"] if head.get("tag") else 0
        return count, count // page_granules
    numbers = [head.get("tagged"), head.get("tagged_pages")]
    values = [value if type(value) is int else 0 for value in numbers]
    return values[0], values[1]


def mutate(data: bytes, seed: int, max_size: int) -> bytes:
    """Return a changed file, the same for the same data and seed."""
    rng = random.Random(seed)  # noqa: S311
    if rng.random() < 0.06:
        return _blind(data, rng)[:max_size]
    snapshot = take_apart(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        rng.choice(_CHANGES)(snapshot, rng)
    mended = put_together(snapshot, mend=rng.random() < 0.8)
    if rng.random() < 0.05:
        mended = _blind(mended, rng)
    return mended[:max_size]


def _blind(data: bytes, rng: random.Random) -> bytes:
    """Change, cut or add bytes, whatever they are."""
    found = bytearray(data)
    way = rng.randrange(4)
    at = rng.randrange(len(found) + 1)
    if way == 0 and found:
        found[at % len(found)] ^= 1 << rng.randrange(8)
    elif way == 1:
        del found[at:]
    elif way == 2:
        found[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
    else:
        del found[at : at + rng.choice((1, 8, 100))]
    return bytes(found)


# --- changes of records -------------------------------------------------------------------


def _maps(value: object) -> list[dict[object, object]]:
    """All maps in a value, itself included."""
    found: list[dict[object, object]] = []
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            found.append(item)
            left += item.values()
        elif isinstance(item, list):
            left += item
    return found


def _value(rng: random.Random, old: object) -> object:
    if type(old) is int and rng.random() < 0.7:
        step = rng.choice((1, -1, 16, -16, 256, 4096, -4096, 65536))
        return rng.choice((old + step, old * 2, old // 2, rng.choice(_NUMBERS)))
    # A copy, as a value in a map can be changed later.
    return rng.choice(_NUMBERS) if rng.random() < 0.5 else _copied(rng.choice(_ODD))


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except RecursionError:  # an array in an array in an array ..., as deep as msgpack reads it
        return None


def _change_field(snapshot: Snapshot, rng: random.Random) -> None:
    maps = [found for part in snapshot.parts for found in _maps(part.head)]
    if maps:
        chosen = rng.choice(maps)
        if chosen:
            key = rng.choice(list(chosen))
            chosen[key] = _value(rng, chosen[key])


def _change_keys(snapshot: Snapshot, rng: random.Random) -> None:
    maps = [found for part in snapshot.parts for found in _maps(part.head)]
    if maps:
        chosen = rng.choice(maps)
        if chosen and rng.random() < 0.5:
            del chosen[rng.choice(list(chosen))]
        else:
            chosen[rng.choice(("x-new", "new", "ipa", "", 5, "enc", "tag"))] = _value(rng, 0)


def _change_list(snapshot: Snapshot, rng: random.Random) -> None:
    """Change the memslots or the scope: one more, one less, one elsewhere."""
    head = snapshot.parts[0].head if snapshot.parts else None
    if not isinstance(head, dict):
        return
    items = head.get(rng.choice(("memslots", "scope")))
    if not isinstance(items, list) or not items:
        return
    which = rng.randrange(len(items))
    way = rng.randrange(4)
    if way == 0:
        items.insert(which, _copied(items[rng.randrange(len(items))]))
    elif way == 1:
        del items[which]
    elif way == 2:
        rng.shuffle(items)
    elif isinstance(items[which], list) and items[which]:
        place = rng.randrange(len(items[which]))
        items[which] = [*items[which]]
        items[which][place] = _value(rng, items[which][place])


def _change_order(snapshot: Snapshot, rng: random.Random) -> None:
    parts = snapshot.parts
    if not parts:
        return
    one, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    way = rng.randrange(3)
    if way == 0:
        parts[one], parts[other] = parts[other], parts[one]
    elif way == 1:
        del parts[one]
    elif len(parts) < 64:
        twice = parts[one]
        head = _copied(twice.head)
        parts.insert(other, Part(twice.kind, head, twice.payload))


def _change_kind(snapshot: Snapshot, rng: random.Random) -> None:
    if snapshot.parts:
        rng.choice(snapshot.parts).kind = rng.choice(_KINDS)


def _change_payload(snapshot: Snapshot, rng: random.Random) -> None:
    if not snapshot.parts:
        return
    part = rng.choice(snapshot.parts)
    way = rng.randrange(5)
    if way == 0:
        part.payload = _blind(part.payload, rng)
    elif way == 1:
        part.payload = b""
    elif way == 2:
        part.payload += part.payload
    else:
        part.payload = _frame(rng, part)


def _frame(rng: random.Random, part: Part) -> bytes:
    """A zstd frame of some size, which it declares or not."""
    granules = part.head.get("granules") if isinstance(part.head, dict) else None
    n_bytes = granules // 2 if type(granules) is int and 0 < granules <= 1 << 16 else 128
    n_bytes = max(n_bytes + rng.choice((0, 0, 0, 1, -1, 1 << 16, 1 << 22)), 0)
    zeros = n_bytes > 1 << 16 or rng.random() < 0.5
    content = bytes(n_bytes) if zeros else rng.randbytes(n_bytes)
    if isinstance(part.head, dict) and rng.random() < 0.6:
        counts = content.translate(_TAGS_IN_BYTE)
        part.head["tagged"] = counts.count(1) + 2 * counts.count(2)
        pages = [content[at : at + 128] for at in range(0, len(content), 128)]
        part.head["tagged_pages"] = sum(1 for page in pages if any(page))
    declared = rng.random() < 0.8
    compressor = zstandard.ZstdCompressor(
        write_content_size=declared, write_checksum=rng.random() < 0.2
    )
    if declared:
        return compressor.compress(content)
    streaming = compressor.compressobj()
    return streaming.compress(content) + streaming.flush()


def _change_head(snapshot: Snapshot, rng: random.Random) -> None:
    """Make a head that is not a map, or is hard to decode."""
    if not snapshot.parts:
        return
    part = rng.choice(snapshot.parts)
    packed = _packed(part.head)
    part.head = rng.choice(
        (
            _blind(packed, rng),
            b"\x91" * rng.choice((10, 1000, 60000)),
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\xdb\xff\xff\xff\xff",
            packed + packed,
            packed[:-1],
            b"",
            b"\x82\xa1a\x01\xa1a\x01",
        )
    )


def _change_prologue(snapshot: Snapshot, rng: random.Random) -> None:
    found = bytearray(snapshot.prologue)
    found[rng.randrange(16)] ^= 1 << rng.randrange(8)
    snapshot.prologue = bytes(found)


def _change_page_size(snapshot: Snapshot, rng: random.Random) -> None:
    head = snapshot.parts[0].head if snapshot.parts else None
    if isinstance(head, dict):
        head["page_size"] = rng.choice((4096, 16384, 65536, 8192, 0, 1))
        if rng.random() < 0.5:
            head["chunk_granules"] = rng.choice((256, 1024, 4096, 1 << 20, 1 << 25, 0))


_CHANGES = (
    *(_change_field,) * 6,
    *(_change_list, _change_order, _change_payload) * 3,
    *(_change_keys, _change_kind, _change_head, _change_page_size) * 2,
    _change_prologue,
)
