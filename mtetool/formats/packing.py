"""Write tags two a byte, the lower address in the low nibble, as they come."""

from __future__ import annotations

from mtetool.buffers import TagBuffer, as_bytes
from mtetool.files.sink import Sink
from mtetool.loops import pack

# Bytes that are written at once for a run of one tag.
_FILL_BYTES = 1 << 16


class Packer:
    """Packs tags into a sink; an odd one waits for the next."""

    def __init__(self, out: Sink) -> None:
        self._out = out
        self._odd: int | None = None

    def put(self, tags: TagBuffer) -> None:
        """Write tags, one byte each."""
        view = as_bytes(tags)
        if self._odd is not None and len(view):
            self._out.write(bytes([self._odd | view[0] << 4]))
            self._odd, view = None, view[1:]
        if len(view) % 2:
            self._odd, view = view[-1], view[:-1]
        if len(view):
            packed = bytearray(len(view) // 2)
            pack(view, packed)
            self._out.write(memoryview(packed))

    def fill(self, tag: int, n_granules: int) -> None:
        """Write any number of granules of one tag."""
        if self._odd is not None and n_granules:
            self.put(bytes([tag]))
            n_granules -= 1
        pairs = bytes([tag | tag << 4]) * min(n_granules // 2, _FILL_BYTES)
        left = n_granules // 2
        while left:
            self._out.write(pairs[:left])
            left -= min(left, len(pairs))
        if n_granules % 2:
            self._odd = tag

    def finish(self) -> None:
        """Write the last tag, if their number was odd."""
        if self._odd is not None:
            self._out.write(bytes([self._odd]))
            self._odd = None
