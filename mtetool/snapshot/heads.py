"""Encode the heads of all kinds of records from the model, and decode them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from mtetool.errors import UnknownVersionError
from mtetool.files.fields import Fields, pack_map, storable_text, unpack_map
from mtetool.guest import Extent, Memslot, Missing, SlotKind
from mtetool.snapshot.model import (
    ADDRESS_LIMIT,
    MAX_CHUNK_GRANULES,
    MAX_ERRNO,
    MAX_SLOT_ID,
    Footer,
    Header,
    header_problem,
)
from mtetool.snapshot.records import MAX_INDEX_ENTRIES, MAX_RECORDS, MAX_RUNS_SHARE, frame_bound
from mtetool.uapi import GRANULE_BYTES, TAG_MAX

_U64 = ADDRESS_LIMIT - 1
_GRANULES = ADDRESS_LIMIT // GRANULE_BYTES
_FILL, _PACKED, _RUNS = 0, 1, 2
_OVER_BASE = 4  # added to these


@dataclass(frozen=True, slots=True)
class TagsHead:
    """The head of a record of tags; `fill` is its one tag, or None where the payload holds them.

    The payload has `runs` runs, in frames split at `split`; if both are None, it has packed tags.
    With `over_base` they are the exclusive-or of the tags and those of the snapshot's base; a fill
    is then 0.
    """

    ipa: int
    granules: int
    fill: int | None
    tagged_granules: int
    tagged_pages: int
    runs: int | None = None
    over_base: bool = False
    split: tuple[int, int] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of guest memory."""
        return self.granules * GRANULE_BYTES

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.ipa + self.size_bytes


@dataclass(frozen=True, slots=True)
class DoneHead:
    """The end record: the footer, the place of the index, and a digest of everything before it."""

    footer: Footer
    index_offset: int
    index_records: int
    digest: int


# --- HEAD ----------------------------------------------------------------------------------


def storable(header: Header) -> Header:
    """The header, its texts made such that a snapshot can hold them."""
    return replace(
        header,
        source=storable_text(header.source),
        created_utc=storable_text(header.created_utc),
        tool=storable_text(header.tool),
        kernel=storable_text(header.kernel),
        machine=storable_text(header.machine),
        vmm=None if header.vmm is None else storable_text(header.vmm),
        name=None if header.name is None else storable_text(header.name),
    )


def encode_header(header: Header) -> bytes:
    """The head of the first record."""
    slots = [
        {"id": s.id, "ipa": s.ipa, "size": s.size_bytes, "readonly": s.readonly, "kind": s.kind}
        for s in header.memslots
    ]
    return pack_map(
        {
            "id": header.snapshot_id,
            "base": header.base_id,
            "page_size": header.page_size_bytes,
            "granule_size": GRANULE_BYTES,
            "chunk_granules": header.chunk_granules,
            "memslots": slots,
            "scope": [[extent.ipa, extent.size_bytes] for extent in header.scope],
            "source": header.source,
            "created": header.created_utc,
            "tool": header.tool,
            "kernel": header.kernel,
            "machine": header.machine,
            "vmm": header.vmm,
            "name": header.name,
            "paused": header.paused,
        }
    )


def decode_header(data: bytes, where: str) -> Header:
    """Decode the header and check everything in it. Raises DamagedError, UnknownVersionError."""
    fields = unpack_map(data, where)
    fields.integer("granule_size", GRANULE_BYTES, GRANULE_BYTES)
    header = Header(
        snapshot_id=fields.text("id"),
        base_id=fields.text_or_none("base"),
        page_size_bytes=fields.integer("page_size", 1, _U64),
        chunk_granules=fields.integer("chunk_granules", 1, MAX_CHUNK_GRANULES),
        memslots=tuple(_memslot(value, where) for value in fields.array("memslots")),
        scope=tuple(_extent(value, fields) for value in fields.array("scope")),
        source=fields.text("source"),
        created_utc=fields.text("created"),
        tool=fields.text("tool"),
        kernel=fields.text("kernel"),
        machine=fields.text("machine"),
        vmm=fields.text_or_none("vmm"),
        name=fields.text_or_none("name"),
        paused=fields.truth_or_none("paused"),
    )
    fields.end()
    problem = header_problem(header)
    if problem is not None:
        raise fields.wrong(problem)
    return header


def _memslot(value: object, where: str) -> Memslot:
    fields = Fields(value, f"a memslot in {where}")
    kind = fields.text("kind")
    if kind not in ("ram", "rom", "device"):
        raise fields.wrong(f"an unknown kind {kind[:40]!r}")
    slot = Memslot(
        id=fields.integer("id", 0, MAX_SLOT_ID),
        ipa=fields.integer("ipa", 0, _U64),
        size_bytes=fields.integer("size", 1, _U64),
        readonly=fields.truth_or_none("readonly"),
        kind=cast(SlotKind, kind),
    )
    fields.end()
    return slot


def _extent(value: object, fields: Fields) -> Extent:
    if isinstance(value, list) and len(value) == 2:
        ipa, size = value
        if type(ipa) is int and type(size) is int and 0 <= ipa <= _U64 and 0 < size <= _U64:
            return Extent(ipa, size)
    raise fields.wrong("a range of the scope is not a pair of an address and a size")


# --- TAGS, MISS ----------------------------------------------------------------------------


def encode_tags(head: TagsHead) -> bytes:
    """The head of a record of tags."""
    values: dict[str, object] = {"ipa": head.ipa, "granules": head.granules}
    if head.fill is not None and head.over_base:
        return pack_map(values | {"enc": _FILL + _OVER_BASE})
    if head.fill is not None:
        return pack_map(values | {"enc": _FILL, "tag": head.fill})
    values["enc"] = (_PACKED if head.runs is None else _RUNS) + _OVER_BASE * head.over_base
    if head.runs is not None and head.split is not None:
        first, second = head.split
        values.update(runs=head.runs, lengths=first, values=second - first)
    values.update(tagged=head.tagged_granules, tagged_pages=head.tagged_pages)
    return pack_map(values)


def fill_head(ipa: int, granules: int, tag: int, page_granules: int) -> TagsHead:
    """The record of a range that has one tag."""
    tagged = granules if tag else 0
    return TagsHead(ipa, granules, tag, tagged, tagged // page_granules)


def same_head(ipa: int, granules: int) -> TagsHead:
    """The record of a range whose tags are those of the base."""
    return TagsHead(ipa, granules, 0, 0, 0, over_base=True)


def decode_tags(
    data: bytes, where: str, page_granules: int, chunk_granules: int, *, has_base: bool
) -> TagsHead:
    """Decode the head of a record of tags. Raises DamagedError, UnknownVersionError."""
    fields = unpack_map(data, where)
    encoding = fields.integer("enc", 0, 255)
    over_base, shape = bool(encoding & _OVER_BASE), encoding & ~_OVER_BASE
    if shape > _RUNS:
        raise UnknownVersionError(
            f"{where} has its tags in an encoding that this mtetool does not know: {encoding}",
            hint="update mtetool: a newer one wrote it",
        )
    ipa = fields.integer("ipa", 0, _U64)
    if over_base and not has_base:
        raise fields.wrong("it builds on a base, and the snapshot has none")
    if over_base and shape == _FILL:
        head = same_head(ipa, fields.integer("granules", 1, _GRANULES))
    elif shape == _FILL:
        granules = fields.integer("granules", 1, _GRANULES)
        head = fill_head(ipa, granules, fields.integer("tag", 0, TAG_MAX), page_granules)
    else:
        granules = fields.integer("granules", 1, chunk_granules)
        runs = split = None
        if shape == _RUNS:
            runs = fields.integer("runs", 1, granules // MAX_RUNS_SHARE)
            most = frame_bound((runs + 1) // 2)
            first = fields.integer("lengths", 1, most)
            split = (first, first + fields.integer("values", 1, most))
        tagged = fields.integer("tagged", 0, granules)
        low, high = -(-tagged // page_granules), min(tagged, granules // page_granules)
        pages = fields.integer("tagged_pages", low, high)
        head = TagsHead(ipa, granules, None, tagged, pages, runs, over_base, split)
    fields.end()
    return head


def encode_missing(missing: Missing) -> bytes:
    """The head of a record of missing tags."""
    return pack_map(
        {
            "ipa": missing.ipa,
            "size": missing.size_bytes,
            "errno": missing.errno,
            "reason": missing.reason,
        }
    )


def decode_missing(data: bytes, where: str) -> Missing:
    """Decode a record of missing tags. Raises DamagedError, UnknownVersionError."""
    fields = unpack_map(data, where)
    missing = Missing(
        ipa=fields.integer("ipa", 0, _U64),
        size_bytes=fields.integer("size", 1, ADDRESS_LIMIT - 1),
        errno=fields.integer_or_none("errno", 0, MAX_ERRNO),
        reason=fields.text("reason"),
    )
    fields.end()
    return missing


# --- INDX, DONE ----------------------------------------------------------------------------


def encode_index(n_entries: int) -> bytes:
    """The head of a part of the index."""
    return pack_map({"entries": n_entries})


def decode_index(data: bytes, where: str) -> int:
    """The number of entries of a part of the index. Raises DamagedError, UnknownVersionError."""
    fields = unpack_map(data, where)
    n_entries = fields.integer("entries", 1, MAX_INDEX_ENTRIES)
    fields.end()
    return n_entries


def encode_done(done: DoneHead) -> bytes:
    """The head of the end record."""
    footer = done.footer
    return pack_map(
        {
            **({} if footer.changed_granules is None else {"changed": footer.changed_granules}),
            "records": footer.records,
            "granules": footer.granules,
            "tagged": footer.tagged_granules,
            "tagged_pages": footer.tagged_pages,
            "missing": footer.missing_bytes,
            "consistent": footer.consistent,
            "index": done.index_offset,
            "index_records": done.index_records,
            "digest": done.digest,
        }
    )


def decode_done(data: bytes, where: str, *, has_base: bool) -> DoneHead:
    """Decode the end record. Raises DamagedError, UnknownVersionError."""
    fields = unpack_map(data, where)
    footer = Footer(
        records=fields.integer("records", 1, MAX_RECORDS),
        granules=fields.integer("granules", 0, _U64),
        tagged_granules=fields.integer("tagged", 0, _U64),
        tagged_pages=fields.integer("tagged_pages", 0, _U64),
        missing_bytes=fields.integer("missing", 0, _U64),
        consistent=fields.truth_or_none("consistent"),
        changed_granules=fields.integer_or_absent("changed", 0, _U64) if has_base else None,
    )
    done = DoneHead(
        footer=footer,
        index_offset=fields.integer("index", 0, _U64),
        index_records=fields.integer("index_records", 0, MAX_RECORDS),
        digest=fields.integer("digest", 0, _U64),
    )
    fields.end()
    return done
