"""Files that a released version wrote are read the same way for ever.

The files are frozen: a change that makes this fail needs a new version of the format, and
new files beside these.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtetool.guest import Extent, Memslot, Missing
from mtetool.snapshot.model import Footer
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.summary import opened, read_summary
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.tags import Tags
from tests.snapshot.forge import BASE, HEADER, PAGE, PAGE_GRANULES, header

GOLDEN = Path(__file__).parent / "golden"
P64 = 64 << 10

SHA256 = {
    "64k-delta": "25f2f74a075bbefa8e02cb89dee9c7784c60467d8c07b2970334bae171bef0eb",
    "ancillary": "10abcbbb44282e8e4f69500f8801fbaa5892fb75de52f18549f6d9a87578c581",
    "delta": "70c0c998d8cbaf4d220ebddb9f5ade186f172c18aefde77579b8550fe57d85ee",
    "empty": "2c05343896c2b994b24f43a3a16c03029c6202ecdeaecaa74945d059217aa821",
    "every-kind": "e2a320aeaedcf299fd2935392e25e1a455e828a50561cad990a5486a416de9bb",
    "no-tags": "6437b982e52e1358d30e41de038f828eca0228833ddb811427f24495dbd0fdcb",
    "runs": "05d2a7bd3aeee65cf8721c55e7a441866599e250294802b931aa103395734f96",
}


def path(name: str) -> str:
    return str(GOLDEN / f"v1-{name}.mtesnap")


def pattern(n_granules: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """(granule * 5 + granule // 256) mod 16."""
    i = np.arange(n_granules, dtype=np.uint64)
    return ((i * 5 + i // 256) & 15).astype(np.uint8)


def contents(name: str) -> list[tuple[int, int, object]]:
    """Address, granules, and the tag, the tags, or the reason why there are none."""
    with opened(path(name)) as stream:
        reader = SnapshotReader(stream, name)
        result: list[tuple[int, int, object]] = []
        for item in reader:
            n_granules = item.size_bytes // 16
            if isinstance(item, Piece):
                what: object = item.tags().tobytes() if item.fill is None else item.fill
            else:
                what = (item.errno, item.reason)
            result.append((item.ipa, n_granules, what))
        summary = read_summary(path(name))
        assert (reader.header, reader.footer, reader.missing) == (
            summary.header,
            summary.footer,
            summary.missing,
        )
    return result


def test_the_files_are_frozen() -> None:
    found = {
        file.stem.removeprefix("v1-"): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in GOLDEN.glob("v1-*.mtesnap")
    }
    assert found == SHA256


def test_every_kind() -> None:
    first = bytearray(2 * PAGE_GRANULES)
    first[:8] = range(8)
    assert contents("every-kind") == [
        (0, 4 * PAGE_GRANULES, 0),
        (BASE, 2 * PAGE_GRANULES, bytes(first)),
        (BASE + 2 * PAGE, 3 * PAGE_GRANULES, 5),
        (BASE + 5 * PAGE, 3 * PAGE_GRANULES, (14, "no memory")),
        (BASE + 5 * PAGE, PAGE_GRANULES, bytes(first[:PAGE_GRANULES])),
    ]
    summary = read_summary(path("every-kind"))
    assert summary.header == HEADER
    assert summary.footer == Footer(7, 10 * PAGE_GRANULES, 3 * PAGE_GRANULES + 14, 5, 8192, True)
    assert summary.missing == (Missing(BASE + 6 * PAGE, 2 * PAGE, 14, "no memory"),)


def test_no_tags() -> None:
    assert contents("no-tags") == [
        (BASE, 1 << 27, 0),
        (BASE + (2 << 30), 1 << 26, 9),
        (BASE + (3 << 30), 1 << 26, (None, "the guest ended")),
    ]
    about = read_summary(path("no-tags")).header
    assert (about.vmm, about.name, about.paused) == (None, None, None)
    assert about.chunk_granules == 2 << 20


def test_64k_delta() -> None:
    chunk = pattern(2 * P64 // 16)
    assert contents("64k-delta") == [
        (BASE, chunk.size, chunk.tobytes()),
        (BASE + 2 * P64, chunk.size, chunk[::-1].tobytes()),
        (BASE + 8 * P64, chunk.size, chunk.tobytes()),
        (BASE + 3 * P64, P64 // 16, (5, "Input/output error")),
        (BASE + 9 * P64, P64 // 16, 15),
    ]
    about = read_summary(path("64k-delta")).header
    assert about.base_id == "ffeeddccbbaa99887766554433221100"
    assert about.page_size_bytes == P64
    assert about.memslots == (Memslot(3, BASE, 64 * P64, readonly=None),)
    assert about.scope == (Extent(BASE, 4 * P64), Extent(BASE + 8 * P64, 2 * P64))


def test_empty() -> None:
    assert contents("empty") == []
    assert read_summary(path("empty")).footer == Footer(1, 0, 0, 0, 0, True)


def with_runs() -> Tags:
    tags = np.zeros(4 * PAGE_GRANULES, dtype=np.uint8)
    tags[10:300], tags[300:303], tags[700:] = 7, 2, 15
    return tags


def test_runs() -> None:
    assert contents("runs") == [
        (BASE, 4 * PAGE_GRANULES, with_runs().tobytes()),
        (BASE + 4 * PAGE, 4 * PAGE_GRANULES, pattern(4 * PAGE_GRANULES).tobytes()),
    ]


def test_delta() -> None:
    changes = np.zeros(4 * PAGE_GRANULES, dtype=np.uint8)
    changes[5], changes[1000:] = 9, 3
    assert contents("delta") == [
        (BASE, 2 * PAGE_GRANULES, 0),
        (BASE + 2 * PAGE, changes.size, changes.tobytes()),
        (BASE + 6 * PAGE, 2 * PAGE_GRANULES, pattern(2 * PAGE_GRANULES).tobytes()),
        (BASE + 8 * PAGE, 4 * PAGE_GRANULES, with_runs().tobytes()),
        (BASE + 12 * PAGE, 4 * PAGE_GRANULES, 4),
    ]
    with opened(path("delta")) as stream:
        reader = SnapshotReader(stream, "delta")
        over_base = [piece.over_base for piece in reader if isinstance(piece, Piece)]
    assert over_base == [True, True, True, False, False]
    assert reader.header.base_id == HEADER.snapshot_id


def test_ancillary() -> None:
    chunk = pattern(2 * PAGE_GRANULES)
    assert contents("ancillary") == [
        (BASE, 2 * PAGE_GRANULES, 3),
        (BASE + 2 * PAGE, chunk.size, chunk.tobytes()),
    ]


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_writer_writes_the_same_bytes(jobs: int) -> None:
    """The snapshot has no compressed tags, as the output of zstd depends on its version."""
    about = replace(header(1 << 20), vmm=None, name=None, paused=None, chunk_granules=2 << 20)
    out = io.BytesIO()
    with SnapshotWriter(out, about, jobs=jobs) as writer:
        for at in range(0, 2 << 30, 32 << 20):
            writer.add_fill(BASE + at, 32 << 20, 0)
        writer.add_fill(BASE + (2 << 30), 1 << 30, 9)
        writer.add_missing(Missing(BASE + (3 << 30), 1 << 30, None, "the guest ended"))
        writer.finish(consistent=False)
    assert out.getvalue() == Path(path("no-tags")).read_bytes()
