"""What a reader would refuse, the writer does; what a reader prints, it has compared."""

from __future__ import annotations

import io

import msgpack  # type: ignore[import-untyped]
import pytest

from mtetool.errors import DamagedError, LayoutError, RangeError
from mtetool.guest import Memslot
from mtetool.snapshot.model import Extent, Missing
from mtetool.snapshot.writer import SnapshotWriter
from tests.snapshot.forge import (
    BASE,
    PAGE,
    PAGE_GRANULES,
    header,
    random_tags,
    read_all,
    small_forge,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"memslots": (Memslot(-1, BASE, PAGE),)},
        {"memslots": (Memslot(1 << 32, BASE, PAGE),)},
        {"memslots": (Memslot(0, 0, 1 << 64),)},
        {"scope": (Extent(0, 1 << 64),)},
    ],
)
def test_headers_that_no_reader_takes(changes: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        SnapshotWriter(io.BytesIO(), header(8, **changes))


def test_the_largest_slot_number() -> None:
    out = io.BytesIO()
    with SnapshotWriter(out, header(1, memslots=(Memslot((1 << 32) - 1, BASE, PAGE),))) as writer:
        writer.add_fill(BASE, PAGE, 0)
        writer.finish(consistent=None)
    assert read_all(out.getvalue())[0].header.memslots[0].id == (1 << 32) - 1


@pytest.mark.parametrize("errno", [-14, 1 << 31])
def test_errnos_that_no_reader_takes(errno: int) -> None:
    with SnapshotWriter(io.BytesIO(), header(1)) as writer:
        with pytest.raises(RangeError, match="errno"):
            writer.add_missing(Missing(BASE, PAGE, errno, "x"))
        writer.add_fill(BASE, PAGE, 0)
        writer.finish(consistent=None)


def test_all_of_the_address_space_is_not_missing_at_once() -> None:
    half = 1 << 63
    scope = (Extent(0, half), Extent(half, half))
    out = io.BytesIO()
    with SnapshotWriter(out, header(1, scope=scope)) as writer:
        with pytest.raises(RangeError, match="address space"):
            writer.add_missing(Missing(0, 2 * half, None, "x"))
        writer.add_missing(Missing(0, half, None, "x"))
        writer.add_fill(half, half, 3)
        writer.finish(consistent=None)
    assert read_all(out.getvalue())[0].footer.missing_bytes == half


@pytest.mark.parametrize("depth", [900, 1000, 1022])
@pytest.mark.parametrize("key", ["ipa", "granules", "enc", "tag"])
def test_values_nested_deeper_than_python_prints(key: str, depth: int) -> None:
    packer = msgpack.Packer()
    head = packer.pack_map_header(4)
    for name, value in {"ipa": BASE, "granules": PAGE_GRANULES, "enc": 0, "tag": 0}.items():
        nested = b"\x91" * depth + b"\0"
        head += packer.pack(name) + (nested if name == key else packer.pack(value))
    with pytest.raises(DamagedError, match=key):
        read_all(small_forge().record(b"TAGS", head).data)


@pytest.mark.parametrize("key", ["tagged", "tagged_pages"])
@pytest.mark.parametrize("more", [-1, 1])
def test_counts_that_are_not_those_of_the_tags(key: str, more: int) -> None:
    """Totals, index and checksums are right: only the tags themselves can tell."""
    tags = random_tags(4)
    tags[:PAGE_GRANULES] = tags[::2] = 0  # so that another count is still a possible one
    counted = getattr(small_forge().tags(BASE, tags), key)
    forge = small_forge().tags(BASE, tags, None, **{key: counted + more})
    with pytest.raises(DamagedError, match="not as many"):
        read_all(forge.end(**{key: counted + more}))
