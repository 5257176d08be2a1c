"""A second reader, made from mtesnap(5) and nothing else: it shows what the page is worth.

It uses none of the modules under test. It is slow, keeps everything in memory and is for
tests only. If it and mtetool disagree about a snapshot, one of the two or the page is wrong.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import msgpack  # type: ignore[import-untyped]
import zstandard
from xxhash import xxh3_64_intdigest

LIMIT = 1 << 64
U32, U64 = (1 << 32) - 1, LIMIT - 1


class RefusedError(Exception):
    """Not a whole snapshot of version 1; `verdict` is the page's word for it."""

    def __init__(self, verdict: str) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def need(condition: bool, verdict: str = "damaged") -> None:
    """Refuse the snapshot unless a condition holds."""
    if not condition:
        raise RefusedError(verdict)


@dataclass
class Contents:
    """`pages` has the final state of each page: its packed tags, or None if they are missing.

    `log` has (kind, ipa, granules) of every TAGS and MISS.
    """

    head: dict[str, object] = field(default_factory=dict)
    done: dict[str, object] = field(default_factory=dict)
    log: list[tuple[str, int, int]] = field(default_factory=list)
    pages: dict[int, bytes | None] = field(default_factory=dict)


def read(data: bytes) -> Contents:
    """Read everything in a snapshot. Raises RefusedError."""
    return _Reader(data).run()


class _Map:
    """A head: it must have all keys that the page names, no others, and none twice."""

    def __init__(self, value: object, keys: str) -> None:
        need(isinstance(value, dict))
        assert isinstance(value, dict)
        self.values: dict[str, object] = value
        names = keys.split()
        need(all(name in value for name in names))
        others = [key for key in value if key not in names and not key.startswith("x-")]
        need(not others, "unknown version")

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.values[key]
        need(type(value) is int)
        assert isinstance(value, int)
        need(low <= value <= high)
        return value

    def text(self, key: str) -> str:
        value = self.values[key]
        need(isinstance(value, str))
        assert isinstance(value, str)
        need(len(value.encode()) <= 4096)
        return value

    def may_be_nil(self, key: str) -> bool:
        return self.values[key] is None

    def truth(self, key: str) -> None:
        need(self.values[key] is None or isinstance(self.values[key], bool))

    def array(self, key: str) -> list[object]:
        value = self.values[key]
        need(isinstance(value, list))
        assert isinstance(value, list)
        return value


def _pairs(pairs: list[tuple[object, object]]) -> dict[object, object]:
    need(all(isinstance(key, str) for key, _ in pairs))
    need(len({key for key, _ in pairs}) == len(pairs))
    return dict(pairs)


def _decode(head: bytes) -> object:
    try:
        return msgpack.unpackb(head, raw=False, object_pairs_hook=_pairs)
    except RefusedError:
        raise
    except (ValueError, msgpack.UnpackException) as error:
        raise RefusedError("damaged") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.sequence = 0
        self.found = Contents()
        self.index = b""
        self.index_at: int | None = None
        self.index_records = 0
        self.entries = b""
        self.checksums = b""
        self.totals = [0, 0, 0]
        self.changed = (0, 0)
        self.page = 0
        self.chunk = 0
        self.scope: list[tuple[int, int]] = []

    def take(self, n_bytes: int) -> bytes:
        need(self.at + n_bytes <= len(self.data), "truncated")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def run(self) -> Contents:
        start = self.data[:8]
        need(bool(start) and b"\x89MTESNP\n".startswith(start), "not a snapshot")
        prologue = self.take(16)
        need(prologue[8:] == struct.pack("<II", 1, 0), "unknown version")
        kind, head, _ = self.record(prologue)
        need(kind == b"HEAD")
        self.header(head)
        while self.one():
            pass
        return self.found

    def record(self, prologue: bytes = b"") -> tuple[bytes, bytes, bytes]:
        opening = self.take(16)
        checksum = self.take(8)
        kind, n_head, n_payload, sequence = struct.unpack("<4sIII", opening)
        need(n_head <= (1 << 20 if kind == b"HEAD" else 65536))
        n = self.chunk // 2
        bound = 0
        if kind == b"INDX":
            bound = 2097152
        elif kind == b"TAGS" or kind not in (b"HEAD", b"MISS", b"DONE"):
            bound = n + n // 256 + 64
        need(n_payload <= bound)
        head, payload = self.take(n_head), self.take(n_payload)
        found = xxh3_64_intdigest(prologue + opening + head + payload)
        need(checksum == struct.pack("<Q", found))
        need(sequence == self.sequence)
        self.sequence += 1
        if kind != b"DONE":
            self.checksums += checksum
        return kind, head, payload

    def header(self, head: bytes) -> None:
        keys = "id base page_size granule_size chunk_granules memslots scope source created"
        fields = _Map(_decode(head), keys + " tool kernel machine vmm name paused")
        for key in ("id", "base"):
            if key == "id" or not fields.may_be_nil(key):
                text = fields.text(key)
                need(len(text) == 32 and set(text) <= set("0123456789abcdef"))
        self.page = fields.integer("page_size", 4096, 65536)
        need(self.page in (4096, 16384, 65536))
        fields.integer("granule_size", 16, 16)
        self.chunk = fields.integer("chunk_granules", 1, 33554432)
        need(self.chunk * 16 % self.page == 0)
        for key in ("source", "created", "tool", "kernel", "machine"):
            fields.text(key)
        for key in ("vmm", "name"):
            need(fields.may_be_nil(key) or bool(fields.text(key)) or fields.values[key] == "")
        fields.truth("paused")
        slots = []
        for item in fields.array("memslots"):
            slot = _Map(item, "id ipa size readonly kind")
            slot.integer("id", 0, U32)
            slot.truth("readonly")
            need(slot.text("kind") in ("ram", "rom", "device"))
            slots.append((slot.integer("ipa", 0, U64), slot.integer("size", 1, U64)))
        self.ascending(slots)
        for item in fields.array("scope"):
            need(isinstance(item, list) and [type(value) for value in item] == [int, int])
            assert isinstance(item, list)
            need(0 <= item[0] <= U64 and 0 < item[1] <= U64)
            self.scope.append((item[0], item[1]))
        self.ascending(self.scope)
        self.found.head = fields.values

    def ascending(self, ranges: list[tuple[int, int]]) -> None:
        behind = 0
        for ipa, size in ranges:
            need(ipa % self.page == 0 and size % self.page == 0 and ipa >= behind)
            behind = ipa + size
            need(behind <= LIMIT)

    def inside(self, ipa: int, size: int) -> None:
        """Require every page of the range in the scope; its ranges that touch count as one."""
        need(ipa % self.page == 0 and size % self.page == 0 and size > 0)
        at = ipa
        for start, length in self.scope:
            if start <= at < start + length:
                at = start + length
        need(at >= ipa + size)

    def one(self) -> bool:
        start = self.at
        kind, head, payload = self.record()
        if kind == b"DONE":
            self.done(start, head)
            return False
        need(self.sequence <= 16777216)
        need(kind != b"HEAD")
        if kind == b"INDX":
            n_entries = _Map(_decode(head), "entries").integer("entries", 1, 65536)
            need(len(payload) == 32 * n_entries)
            self.index_at = start if self.index_at is None else self.index_at
            self.index_records += 1
            self.index += payload
            return True
        need(self.index_at is None)
        if kind == b"TAGS":
            ipa, granules = self.tags(head, payload)
        elif kind == b"MISS":
            ipa, granules = self.miss(head)
        else:
            need(b"a" <= kind[:1] <= b"z", "unknown version")
            return True
        self.found.log.append((kind.decode(), ipa, granules))
        self.entries += struct.pack("<QQQ4sI", start, ipa, granules, kind, self.at - start)
        return True

    def miss(self, head: bytes) -> tuple[int, int]:
        fields = _Map(_decode(head), "ipa size errno reason")
        ipa, size = fields.integer("ipa", 0, U64), fields.integer("size", 1, U64)
        self.inside(ipa, size)
        need(fields.may_be_nil("errno") or fields.integer("errno", 0, (1 << 31) - 1) >= 0)
        fields.text("reason")
        for page in range(ipa, ipa + size, self.page):
            self.found.pages[page] = None
        return ipa, size // 16

    def tags(self, head: bytes, payload: bytes) -> tuple[int, int]:
        value = _decode(head)
        need(isinstance(value, dict) and type(value.get("enc")) is int)
        assert isinstance(value, dict)
        encoding = value["enc"]
        need(0 <= encoding <= 255)
        need(encoding & ~4 in (0, 1, 2), "unknown version")
        over_base, encoding = encoding & 4, encoding & ~4
        need(not over_base or self.found.head["base"] is not None)
        keys = "ipa granules enc "
        extra = (
            "" if over_base else "tag",
            "tagged tagged_pages",
            "runs lengths values tagged tagged_pages",
        )
        fields = _Map(value, keys + extra[encoding])
        ipa = fields.integer("ipa", 0, U64)
        granules = fields.integer("granules", 1, self.chunk if encoding else LIMIT // 16)
        self.inside(ipa, granules * 16)
        if encoding == 0:
            need(not payload)
            tag = 0 if over_base else fields.integer("tag", 0, 15)
            packed = bytes([tag * 17]) * (granules // 2)
        elif encoding == 1:
            packed = self.content(payload, granules // 2, granules // 2)
        else:
            runs = fields.integer("runs", 1, granules // 4)
            half = (runs + 1) // 2
            most = half + half // 256 + 64
            first = fields.integer("lengths", 1, most)
            second = first + fields.integer("values", 1, most)
            lengths = self.content(payload[:first], half, half)
            values = self.content(payload[first:second], half, half)
            longs = payload[second:] and self.content(payload[second:], 1, granules // 16)
            packed = self.runs(lengths, values, longs, runs, granules)
        per_page = self.page // 32
        tagged = tagged_pages = 0
        for at in range(0, len(packed), per_page):
            page = packed[at : at + per_page]
            n_tagged = sum((byte & 15 != 0) + (byte >> 4 != 0) for byte in page)
            tagged += n_tagged
            tagged_pages += n_tagged != 0
            self.found.pages[ipa + at * 32] = page
        if encoding:
            fields.integer("tagged", tagged, tagged)
            fields.integer("tagged_pages", tagged_pages, tagged_pages)
        low, high = self.changed
        self.changed = (low + tagged, high + tagged) if over_base else (low, high + granules)
        self.totals = [
            a + b for a, b in zip(self.totals, (granules, tagged, tagged_pages), strict=True)
        ]
        return ipa, granules

    def content(self, frame: bytes, least: int, most: int) -> bytes:
        try:
            size = zstandard.get_frame_parameters(frame).content_size
            need(least <= size <= most)
            data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise RefusedError("damaged") from error
        need(len(data) == size)
        return data

    def runs(
        self, lengths: bytes, values: bytes, longs: bytes, n_runs: int, granules: int
    ) -> bytes:
        """The packed tags of memory that is stored as runs."""
        pairs = [
            (length, tag)
            for both in zip(lengths, values, strict=True)
            for length, tag in (
                (both[0] & 15, both[1] & 15),
                (both[0] >> 4, both[1] >> 4),
            )
        ]
        need(not any(any(pair) for pair in pairs[n_runs:]))
        at = 0
        tags = bytearray()
        for length, tag in pairs[:n_runs]:
            if length == 0:
                shift = 0
                while True:
                    need(at < len(longs) and shift < 42)
                    length |= (longs[at] & 127) << shift
                    at += 1
                    shift += 7
                    if longs[at - 1] < 128:
                        break
                length += 16
            need(length <= granules - len(tags))
            tags += bytes([tag]) * length
        need(len(tags) == granules and at == len(longs))
        return bytes(low | high << 4 for low, high in zip(tags[::2], tags[1::2], strict=True))

    def done(self, start: int, head: bytes) -> None:
        keys = "records granules tagged tagged_pages missing consistent index index_records digest"
        decoded = _decode(head)
        has_changed = isinstance(decoded, dict) and "changed" in decoded
        if has_changed and self.found.head["base"] is not None:
            keys += " changed"
        fields = _Map(decoded, keys)
        if has_changed:
            fields.integer("changed", *self.changed)
        fields.truth("consistent")
        missing = sum(self.page for page in self.found.pages.values() if page is None)
        expected = {
            "records": self.sequence - 1,
            "granules": self.totals[0],
            "tagged": self.totals[1],
            "tagged_pages": self.totals[2],
            "missing": missing,
            "index": start if self.index_at is None else self.index_at,
            "index_records": self.index_records,
            "digest": xxh3_64_intdigest(self.checksums),
        }
        for key, value in expected.items():
            fields.integer(key, value, value)
        need(self.index == self.entries)
        for ipa, size in self.scope:
            need(all(page in self.found.pages for page in range(ipa, ipa + size, self.page)))
        need(self.take(16) == struct.pack("<Q8s", start, b"\x89MTEEND\n"))
        need(self.at == len(self.data))
        self.found.done = fields.values
