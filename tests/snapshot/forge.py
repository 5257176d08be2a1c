"""Snapshots for tests: whole ones by the writer, and impossible ones byte by byte.

The second kind is built from mtesnap(5), not from the code under test: checksums, digests
and the index are right unless a test breaks them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
import zstandard
from xxhash import xxh3_64_intdigest

from mtetool.errors import SnapshotError
from mtetool.guest import Extent, Memslot, Missing
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.model import Header
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.tags import Tags

PAGE = 4096
PAGE_GRANULES = PAGE // 16
BASE = 0x4000_0000

HEADER = Header(
    page_size_bytes=PAGE,
    memslots=(
        Memslot(0, 0, 4 * PAGE, readonly=True, kind="rom"),
        Memslot(1, BASE, 64 * PAGE),
        Memslot(2, 1 << 63, PAGE, readonly=None, kind="device"),
    ),
    scope=(Extent(0, 4 * PAGE), Extent(BASE, 8 * PAGE)),
    source="kvm:4711",
    created_utc="2026-01-02T03:04:05Z",
    tool="mtetool 0.1.0",
    kernel="6.12.0",
    machine="aarch64",
    vmm="qemu",
    name="gäst",
    paused=True,
    snapshot_id="00112233445566778899aabbccddeeff",
    chunk_granules=4 * PAGE_GRANULES,
)


def header(n_pages: int, **changes: object) -> Header:
    """A header whose scope is `n_pages` pages at `BASE`."""
    slots = (Memslot(0, BASE, n_pages * PAGE),)
    scope = (Extent(BASE, n_pages * PAGE),)
    return replace(HEADER, **{"memslots": slots, "scope": scope, **changes})  # type: ignore[arg-type]


def random_tags(n_pages: int, seed: int = 1) -> Tags:
    """Random tags, without long runs; one byte per granule."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 16, n_pages * PAGE_GRANULES, dtype=np.uint8)


def small_snapshot() -> bytes:
    """A snapshot of a few hundred bytes with every kind of record."""
    out = io.BytesIO()
    pattern = np.zeros(2 * PAGE_GRANULES, dtype=np.uint8)
    pattern[:8] = range(8)
    with SnapshotWriter(out, HEADER) as writer:
        writer.add_fill(0, 4 * PAGE, 0)
        writer.add_tags(BASE, pattern)
        writer.add_fill(BASE + 2 * PAGE, 3 * PAGE, 5)
        writer.add_missing(Missing(BASE + 5 * PAGE, 3 * PAGE, 14, "no memory"))
        writer.add_tags(BASE + 5 * PAGE, pattern[:PAGE_GRANULES])
        writer.finish(consistent=True)
    return out.getvalue()


def read_all(data: bytes) -> tuple[SnapshotReader, list[Piece | Missing]]:
    """Read everything in a snapshot, with every piece decompressed."""
    reader = SnapshotReader(io.BytesIO(data), "test")
    pieces = list(reader)
    for piece in pieces:
        if isinstance(piece, Piece) and piece.fill is None:
            piece.tags()
    return reader, pieces


def read_range(path: str, extents: Sequence[Extent]) -> list[Piece | Missing]:
    """The records of a file that overlap any of `extents`, read by the index."""
    with Path(path).open("rb") as stream:
        snapshot = IndexedSnapshot.of(stream, path)
        return [
            snapshot.load(entry)
            for entry in snapshot.entries()
            if any(e.ipa < entry.ipa + entry.size_bytes and entry.ipa < e.end for e in extents)
        ]


# --- byte by byte ----------------------------------------------------------------------------


def frame(tags: Tags) -> bytes:
    """The payload of a packed record of tags."""
    packed = (tags[0::2] | tags[1::2] << 4).astype(np.uint8)
    return zstandard.ZstdCompressor().compress(packed.tobytes())


def head_map(about: Header = HEADER, /, **changes: object) -> dict[str, object]:
    """The map of a header record."""
    values: dict[str, object] = {
        "id": about.snapshot_id,
        "base": about.base_id,
        "page_size": about.page_size_bytes,
        "granule_size": 16,
        "chunk_granules": about.chunk_granules,
        "memslots": [
            {"id": s.id, "ipa": s.ipa, "size": s.size_bytes, "readonly": s.readonly, "kind": s.kind}
            for s in about.memslots
        ],
        "scope": [[extent.ipa, extent.size_bytes] for extent in about.scope],
        "source": about.source,
        "created": about.created_utc,
        "tool": about.tool,
        "kernel": about.kernel,
        "machine": about.machine,
        "vmm": about.vmm,
        "name": about.name,
        "paused": about.paused,
    }
    return {**values, **changes}


@dataclass
class Forge:
    """Appends records, with whatever a test wants in them."""

    head: Mapping[str, object] | bytes = field(default_factory=head_map)
    version: int = 1
    flags: int = 0
    data: bytes = b""
    checksums: bytes = b""
    index: bytes = b""
    records: int = 0
    granules: int = 0
    tagged: int = 0
    tagged_pages: int = 0
    missing: int = 0

    def __post_init__(self) -> None:
        prologue = struct.pack("<8sII", b"\x89MTESNP\n", self.version, self.flags)
        self.data = prologue
        self.record(b"HEAD", self.head, covered=prologue)

    def record(
        self,
        kind: bytes,
        head: Mapping[str, object] | bytes,
        payload: bytes = b"",
        *,
        covered: bytes = b"",
        sequence: int | None = None,
        sizes: tuple[int, int] | None = None,
    ) -> Forge:
        """Append any record; `sizes` are wrong lengths to declare."""
        packed = head if isinstance(head, bytes) else msgpack.packb(dict(head))
        lengths = sizes or (len(packed), len(payload))
        number = self.records if sequence is None else sequence
        preamble = struct.pack("<4sIII", kind, *lengths, number)
        checksum = struct.pack("<Q", xxh3_64_intdigest(covered + preamble + packed + payload))
        self.data += preamble + checksum + packed + payload
        self.checksums += checksum
        self.records += 1
        return self

    def indexed(
        self, kind: bytes, head: Mapping[str, object], payload: bytes, ipa: int, granules: int
    ) -> Forge:
        """Append a record, and its entry in the index."""
        start = len(self.data)
        self.record(kind, head, payload)
        self.index += struct.pack("<QQQ4sI", start, ipa, granules, kind, len(self.data) - start)
        return self

    def fill(self, ipa: int, n_pages: int, tag: int = 0, /, **extra: object) -> Forge:
        """Append a record of memory with one tag."""
        granules = n_pages * PAGE_GRANULES
        self.granules += granules
        self.tagged += granules if tag else 0
        self.tagged_pages += n_pages if tag else 0
        head = {"ipa": ipa, "granules": granules, "enc": 0, "tag": tag, **extra}
        return self.indexed(b"TAGS", head, b"", ipa, granules)

    def tags(self, ipa: int, tags: Tags, payload: bytes | None = None, /, **extra: object) -> Forge:
        """Append a packed record of tags."""
        tagged, pages = int((tags > 0).sum()), int(tags.reshape(-1, PAGE_GRANULES).any(1).sum())
        self.granules += tags.size
        self.tagged += tagged
        self.tagged_pages += pages
        head: dict[str, object] = {"ipa": ipa, "granules": tags.size, "enc": 1}
        head.update({"tagged": tagged, "tagged_pages": pages, **extra})
        return self.indexed(b"TAGS", head, payload or frame(tags), ipa, int(tags.size))

    def miss(self, ipa: int, n_pages: int, /, **extra: object) -> Forge:
        """Append a record of missing tags, which no later record replaces."""
        self.missing += n_pages * PAGE
        head = {"ipa": ipa, "size": n_pages * PAGE, "errno": 14, "reason": "x", **extra}
        return self.indexed(b"MISS", head, b"", ipa, n_pages * PAGE_GRANULES)

    def end(self, index: bytes | None = None, /, **changes: object) -> bytes:
        """Append the index, the end record and the trailer; return the file."""
        index_offset, index_records = len(self.data), 0
        entries = self.index if index is None else index
        if entries:
            self.record(b"INDX", {"entries": len(entries) // 32}, entries)
            index_records = 1
        values: dict[str, object] = {
            "records": self.records,
            "granules": self.granules,
            "tagged": self.tagged,
            "tagged_pages": self.tagged_pages,
            "missing": self.missing,
            "consistent": None,
            "index": index_offset,
            "index_records": index_records,
            "digest": xxh3_64_intdigest(self.checksums),
        }
        start = len(self.data)
        self.record(b"DONE", {**values, **changes})
        return self.data + struct.pack("<Q8s", start, b"\x89MTEEND\n")


def small_forge(n_pages: int = 4, **changes: object) -> Forge:
    """A forged snapshot of `n_pages` pages at `BASE`."""
    return Forge(head_map(header(n_pages), **changes))


def refused(data: bytes, kind: type[SnapshotError], match: str | None = None) -> None:
    """Check that reading front to back ends in this error."""
    with pytest.raises(kind, match=match):
        read_all(data)
