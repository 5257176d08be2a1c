"""Convert tags to and from the payload of a record: as runs or packed, in zstd frames.

python-zstandard's streaming calls silently accept a truncated frame, and its one-shot call ignores
`max_output_size` where the frame declares a size itself. So before anything is decompressed, a
frame must declare exactly the size that the record's head implies.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import zstandard

from mtetool import loops
from mtetool.buffers import as_bytes, prepared
from mtetool.snapshot.records import LONG_RUN_GRANULES
from mtetool.uapi import TAG_MAX

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer


_NOISE_BYTES = 64 << 10


class FrameError(Exception):
    """A payload that is not the frame that it must be; the text says why."""


Split = tuple[int, int]
"""Where in a payload its second frame begins, and its third if there is one."""


class Encoded(NamedTuple):
    """Tags as a record holds them: `fill` is their one tag, or it is None and `frame` has them.

    `runs` is the number of runs in the frame; None where it has packed tags. Runs are two or three
    frames, split at the two offsets in `split`: lengths, tags and long lengths compress better
    separately. With `over_base` they are the exclusive-or of the tags and those of the base.
    """

    fill: int | None
    runs: int | None
    tagged_granules: int
    tagged_pages: int
    frame: bytes
    over_base: bool = False
    split: Split | None = None
    changed: int | None = None
    """The number of granules whose tag is not the base's, where it is known."""


BaseTags = Callable[[int, memoryview], bool]
"""Writes the base's tags from an address on to a buffer; False where it lacks some of them."""


class Encoder:
    """Encodes chunks of tags in any number of threads, with buffers and a context for each."""

    def __init__(self, level: int, chunk_granules: int) -> None:
        self._level = level
        self._chunk_granules = chunk_granules
        self._local = threading.local()

    def __call__(self, tags: TagBuffer, page_granules: int) -> Encoded:
        """Encode whole pages of tags, at most `chunk_granules`, bits 7:4 zero.

        Frames declare their size and have no checksum: the record has one. Raises ValueError for
        bytes that are not tags.
        """
        return self._encode(as_bytes(tags), page_granules)

    def reading(
        self, read: Callable[[memoryview], None], n_granules: int, page_granules: int
    ) -> Encoded:
        """As a call, for tags that `read` writes to a buffer of this thread."""
        tags = self._buffers().tags[:n_granules]
        read(tags)
        return self(tags, page_granules)

    def changes(self, tags: TagBuffer, page_granules: int) -> Encoded:
        """As a call, for tags that are already over a base."""
        return self._encode(as_bytes(tags), page_granules, over_base=True)

    def against(self, base: BaseTags, ipa: int, tags: TagBuffer, page_granules: int) -> Encoded:
        """As a call, for tags from `ipa` on; over the base's where that is shorter."""
        mine = self._buffers()
        change = mine.change[: len(as_bytes(tags))]
        if not base(ipa, change):
            return self(tags, page_granules)._replace(changed=len(change))
        loops.xor(change, tags)
        found, changed = loops.scan(tags, page_granules), loops.scan(change, page_granules)
        if found[3] > 15:
            raise ValueError("bytes that are not tags")
        is_same = changed[0] == 1 and not changed[3]
        if is_same or changed[0] < found[0]:
            return self._encode(change, page_granules, over_base=True)
        return self._encode(as_bytes(tags), page_granules)._replace(changed=changed[1])

    def _encode(self, view: memoryview, page_granules: int, *, over_base: bool = False) -> Encoded:
        mine = self._buffers()
        n_runs, tagged, pages, bits, size = loops.to_runs(view, page_granules, mine.room)
        if bits > TAG_MAX:
            raise ValueError("bytes that are not tags")
        changed = tagged if over_base else None
        if n_runs == 1 and not (over_base and view[0]):
            return Encoded(view[0], None, tagged, pages, b"", over_base, None, changed)
        if size:
            half = (n_runs + 1) // 2
            lengths = mine.zstd.compress(mine.room[:half])
            values = mine.zstd.compress(mine.room[half : 2 * half])
            longs = mine.zstd.compress(mine.room[2 * half : size]) if size > 2 * half else b""
            split = (len(lengths), len(lengths) + len(values))
            frame = b"".join((lengths, values, longs))
            return Encoded(None, n_runs, tagged, pages, frame, over_base, split, changed)
        size = len(view) // 2
        loops.pack(view, mine.room[:size])
        frame = mine.zstd.compress(mine.room[:size])
        return Encoded(None, None, tagged, pages, frame, over_base, None, changed)

    def warm_up(self) -> None:
        """Allocate this thread's buffers and use them once, so that nothing is allocated later."""
        mine = self._buffers()
        # Data that hardly compresses, of the largest size: the allocator keeps that much.
        half = self._chunk_granules // 2
        mine.room[:half] = (os.urandom(_NOISE_BYTES) * (half // _NOISE_BYTES + 1))[:half]
        mine.zstd.compress(mine.room[:half])

    def _buffers(self) -> _Buffers:
        buffers: _Buffers | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = _Buffers(self._level, self._chunk_granules)
        return buffers


def _parameters(level: int) -> zstandard.ZstdCompressionParameters:
    """Frames that declare their size and have no checksum: the record has one.

    Lengths of runs rarely repeat in long strings, and looking for short ones costs more than it
    saves: this level 1 hardly looks, which makes it twice as fast as zstd's own on the lengths of a
    heap, and its output smaller.
    """
    common = {"write_content_size": True, "write_checksum": False}
    if level != 1:
        return zstandard.ZstdCompressionParameters.from_level(level, **common)
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        **common,
    )


class _Buffers:
    def __init__(self, level: int, chunk_granules: int) -> None:
        self.room = prepared(chunk_granules)
        self._chunk_granules = chunk_granules
        self._change: memoryview | None = None
        self._tags: memoryview | None = None
        self.zstd = zstandard.ZstdCompressor(compression_params=_parameters(level))

    @property
    def tags(self) -> memoryview:
        """Room for a chunk, made when it is first needed."""
        if self._tags is None:
            self._tags = prepared(self._chunk_granules)
        return self._tags

    @property
    def change(self) -> memoryview:
        """Room for a chunk of a base, made when it is first needed."""
        if self._change is None:
            self._change = prepared(self._chunk_granules)
        return self._change


def decode(payload: bytes, tags: memoryview, *, runs: int | None, split: Split | None) -> None:
    """Fill `tags`, one byte a granule, from the payload of a record. Raises FrameError.

    `runs` is how many runs the record announces, in frames split at `split`; None for packed tags.
    """
    n_granules = len(tags)
    if runs is None or split is None:
        loops.unpack(content(payload, n_granules // 2, n_granules // 2), tags)
        return
    first, second = split
    half = (runs + 1) // 2
    lengths = content(payload[:first], half, half)
    values = content(payload[first:second], half, half)
    longs = payload[second:]
    if longs:
        longs = content(longs, 1, n_granules // LONG_RUN_GRANULES)
    try:
        loops.from_runs(lengths, values, longs, runs, tags)
    except ValueError as error:
        raise FrameError(f"its frames hold {error}") from error


def content(frame: bytes, least: int, most: int) -> bytes:
    """The content of a zstd frame, which must declare its size, within these bounds.

    Raises FrameError.
    """
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if not least <= size <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise FrameError(f"its frame declares {size} bytes, not {wanted}")
        data: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FrameError(f"its frame cannot be decompressed: {error}") from error
    if len(data) != size:
        raise FrameError(f"its frame holds {len(data)} bytes, not {size}")
    return data
