"""Tags to and from the payload of a record: as runs or packed, then one zstd frame.

python-zstandard's streaming calls take a truncated frame in silence, and its one-shot call
ignores `max_output_size` where the frame declares a size itself; so a frame must declare
exactly the size that the record's head implies, before anything is decompressed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import zstandard

from mtetool import loops
from mtetool.buffers import as_bytes
from mtetool.snapshot.records import MAX_RUNS_SHARE

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

_WARM_UP_GRANULES = 1 << 16


class FrameError(Exception):
    """A payload that is not the one frame that it has to be; the text says why."""


class Encoded(NamedTuple):
    """Tags as a record holds them: `fill` is their one tag, or None and `frame` has them.

    `runs` is how many runs the frame has; None where it has packed tags. Runs are two frames, the
    first `split` bytes long: lengths and tags compress better each by themselves. With `over_base`
    they are the exclusive-or of the tags and those of the base.
    """

    fill: int | None
    runs: int | None
    tagged_granules: int
    tagged_pages: int
    frame: bytes
    over_base: bool = False
    split: int | None = None


BaseTags = Callable[[int, memoryview], bool]
"""Writes the base's tags from an address on to a buffer; False where it has not all of them."""


class Encoder:
    """Encodes chunks of tags in any number of threads, with buffers and a context for each."""

    def __init__(self, level: int, chunk_granules: int) -> None:
        self._level = level
        self._chunk_granules = chunk_granules
        self._local = threading.local()

    def __call__(self, tags: TagBuffer, page_granules: int) -> Encoded:
        """Encode whole pages of tags, at most `chunk_granules`, bits 7:4 zero.

        Frames declare their size and have no checksum: the record has one. Raises ValueError for
        bytes that are no tags.
        """
        found = loops.scan(tags, page_granules)
        if found[3] > 15:
            raise ValueError("bytes that are no tags")
        return self._encode(as_bytes(tags), found)

    def reading(
        self, read: Callable[[memoryview], None], n_granules: int, page_granules: int
    ) -> Encoded:
        """As a call, for tags that `read` writes to a buffer of this thread."""
        tags = self._buffers().tags[:n_granules]
        read(tags)
        return self(tags, page_granules)

    def changes(self, tags: TagBuffer, page_granules: int) -> Encoded:
        """As a call, for tags that are over a base already."""
        found = loops.scan(tags, page_granules)
        return self._encode(as_bytes(tags), found, over_base=True)

    def against(self, base: BaseTags, ipa: int, tags: TagBuffer, page_granules: int) -> Encoded:
        """As a call, for tags from `ipa` on, or over the base's, where that is shorter."""
        mine = self._buffers()
        change = mine.change[: len(as_bytes(tags))]
        if not base(ipa, change):
            return self(tags, page_granules)
        loops.xor(change, tags)
        found, changed = loops.scan(tags, page_granules), loops.scan(change, page_granules)
        if found[3] > 15:
            raise ValueError("bytes that are no tags")
        is_same = changed[0] == 1 and not changed[3]
        if is_same or changed[0] < found[0]:
            return self._encode(change, changed, over_base=True)
        return self._encode(as_bytes(tags), found)

    def _encode(
        self, view: memoryview, found: tuple[int, int, int, int], *, over_base: bool = False
    ) -> Encoded:
        n_runs, tagged, pages, _ = found
        if n_runs == 1 and not (over_base and view[0]):
            return Encoded(view[0], None, tagged, pages, b"", over_base)
        mine = self._buffers()
        if n_runs <= len(view) // MAX_RUNS_SHARE:
            size = loops.to_runs(view, n_runs, mine.room[: len(view)])
            lengths = mine.zstd.compress(mine.room[:n_runs])
            frame = lengths + mine.zstd.compress(mine.room[n_runs:size])
            return Encoded(None, n_runs, tagged, pages, frame, over_base, len(lengths))
        size = len(view) // 2
        loops.pack(view, mine.room[:size])
        frame = mine.zstd.compress(mine.room[:size])
        return Encoded(None, None, tagged, pages, frame, over_base)

    def warm_up(self) -> None:
        """Make this thread's buffers and use them once, so that later nothing is made."""
        tags = memoryview(bytearray(range(16)) * (_WARM_UP_GRANULES // 16))
        mine = self._buffers()
        loops.pack(tags, mine.room[: len(tags) // 2])
        mine.zstd.compress(mine.room[: len(tags) // 2])

    def _buffers(self) -> _Buffers:
        buffers: _Buffers | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = _Buffers(self._level, self._chunk_granules)
        return buffers


class _Buffers:
    def __init__(self, level: int, chunk_granules: int) -> None:
        # Written to at once, so that its pages are there.
        self.room = memoryview(bytearray(b"\xff") * chunk_granules)
        self._chunk_granules = chunk_granules
        self._change: memoryview | None = None
        self._tags: memoryview | None = None
        self.zstd = zstandard.ZstdCompressor(
            level=level, write_checksum=False, write_content_size=True
        )

    @property
    def tags(self) -> memoryview:
        """Room for a chunk, made when it is first needed."""
        if self._tags is None:
            self._tags = memoryview(bytearray(b"\xff") * self._chunk_granules)
        return self._tags

    @property
    def change(self) -> memoryview:
        """Room for a chunk of a base, made when it is first needed."""
        if self._change is None:
            self._change = memoryview(bytearray(b"\xff") * self._chunk_granules)
        return self._change


def decode(payload: bytes, tags: memoryview, *, runs: int | None, split: int | None) -> None:
    """Fill `tags`, one byte a granule, from the payload of a record. Raises FrameError.

    `runs` is how many runs the record announces, in two frames, the first of `split` bytes; None
    for packed tags.
    """
    n_granules = len(tags)
    if runs is None or split is None:
        loops.unpack(_content(payload, n_granules // 2, n_granules // 2), tags)
        return
    lengths = _content(payload[:split], runs, runs)
    rest = _content(payload[split:], (runs + 1) // 2, n_granules // 2 - runs)
    try:
        loops.from_runs(lengths + rest, runs, tags)
    except ValueError as error:
        raise FrameError(f"its frames hold {error}") from error


def _content(frame: bytes, least: int, most: int) -> bytes:
    """What is in a frame, which must declare how much that is, within these bounds."""
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
