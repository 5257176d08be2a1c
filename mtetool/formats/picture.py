"""A map of memory as a picture: PNG by Pillow, or SVG."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

from mtetool.errors import UsageError
from mtetool.formats.tagmap import MISSING, SHADES, TagMap
from mtetool.uapi import GRANULE_BYTES, TAG_MAX
from mtetool.words import counted

WIDTH_CELLS = 256
MOST_CELLS = 1 << 18
"""The most cells of a picture: 256 in a row, in 1,024 rows."""

_LABEL_PIXELS = 130
_TEXT_PIXELS = 14
_HEAD_PIXELS = 96
_GAP_PIXELS = 6
_MOST_HEIGHT = 2400
_BACKGROUND, _INK = (255, 255, 255), (32, 32, 32)
_UNTAGGED, _GONE = (222, 222, 222), (0, 0, 0)

Colour = tuple[int, int, int]


class _Row(NamedTuple):
    """A row of cells: where it is drawn, its first address, its first cell, and how many."""

    y: int
    ipa: int
    first: int
    n_cells: int


class _Box(NamedTuple):
    """Cells of one colour next to each other."""

    x: int
    y: int
    width: int
    height: int
    colour: Colour


def colour_of(code: int, shade: int) -> Colour:
    """The colour of a cell: the hue is the tag, the more of the cell has one, the stronger."""
    if code == MISSING:
        return _GONE
    if not code:
        return _UNTAGGED
    # Neighbouring tags get hues far from each other.
    hue = code * 7 % TAG_MAX / TAG_MAX
    strength = shade / SHADES
    parts = colorsys.hls_to_rgb(hue, 0.85 - 0.42 * strength, 0.75)
    red, green, blue = (round(part * 255) for part in parts)
    return red, green, blue


class Picture:
    """Where everything of a map is drawn, in pixels."""

    def __init__(self, found: TagMap, title: str) -> None:
        self._map = found
        n_rows = sum(
            -(-(end - first) // WIDTH_CELLS)
            for first, end in zip(found.firsts, found.firsts[1:], strict=False)
        )
        self.cell = next((n for n in (4, 3, 2) if n_rows * n <= _MOST_HEIGHT), 1)
        self.cell = max(self.cell, 2)
        self.rows = list(self._rows())
        bottom = self.rows[-1].y + self.cell if self.rows else _HEAD_PIXELS
        self.width = _LABEL_PIXELS + WIDTH_CELLS * self.cell + _GAP_PIXELS
        self.height = bottom + _GAP_PIXELS
        self.title = f"{title}: a cell is {_short(found.cell_bytes)}"
        self.codes, self.shades = (array.tolist() for array in found.codes())

    def _rows(self) -> Iterator[_Row]:
        y = top = _HEAD_PIXELS
        firsts = self._map.firsts
        for extent, first, end in zip(self._map.extents, firsts, firsts[1:], strict=False):
            for at in range(first, end, WIDTH_CELLS):
                ipa = extent.ipa + (at - first) * self._map.cell_bytes
                yield _Row(y, ipa, at, min(WIDTH_CELLS, end - at))
                y += self.cell
            # The next extent's label must not stand on this one's.
            y = max(y, top + _TEXT_PIXELS) + _GAP_PIXELS
            top = y

    def labels(self) -> Iterator[tuple[int, str]]:
        """The axis: the heights of some rows, and their addresses."""
        below = 0
        end = None
        for row in self.rows:
            if row.y >= below or row.ipa != end:
                yield row.y, f"{row.ipa:#x}"
                below = row.y + 3 * _TEXT_PIXELS
            end = row.ipa + row.n_cells * self._map.cell_bytes

    def boxes(self) -> Iterator[_Box]:
        """The cells, joined where neighbours in a row look the same."""
        for row in self.rows:
            at = 0
            while at < row.n_cells:
                look = self.codes[row.first + at], self.shades[row.first + at]
                stop = at + 1
                while stop < row.n_cells and look == (
                    self.codes[row.first + stop],
                    self.shades[row.first + stop],
                ):
                    stop += 1
                x = _LABEL_PIXELS + at * self.cell
                yield _Box(x, row.y, (stop - at) * self.cell, self.cell, colour_of(*look))
                at = stop

    def legend(self) -> Iterator[tuple[int, int, Colour, str]]:
        """The legend: places of squares, their colours, and what they mean."""
        names = [(0, "no tag"), *((tag, f"{tag:x}") for tag in range(1, 16)), (MISSING, "missing")]
        x = _LABEL_PIXELS
        for code, name in names:
            wide = 84 if len(name) > 1 else 28
            if x + wide > self.width:
                return
            yield x, 34, colour_of(code, SHADES), name
            x += wide


NOTE = "hue: the tag most frequent in a cell; strong: all of it has a tag, pale: a part"


def svg(found: TagMap, title: str) -> Iterator[str]:
    """An SVG file, in pieces."""
    picture = Picture(found, title)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{picture.width}"'
        f' height="{picture.height}" font-family="monospace" font-size="11">\n'
        f"<title>{escape(picture.title)}</title>\n"
        f'<rect width="100%" height="100%" fill="{_hex(_BACKGROUND)}"/>\n'
        f"{_svg_text(_GAP_PIXELS, 20, picture.title)}{_svg_text(_GAP_PIXELS, 70, NOTE)}"
    )
    for x, y, colour, name in picture.legend():
        yield f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_hex(colour)}"/>\n'
        yield _svg_text(x + 15, y + 10, name)
    for y, label in picture.labels():
        yield _svg_text(_GAP_PIXELS, y + 9, label)
    yield '<g shape-rendering="crispEdges">\n'
    for x, y, width, height, colour in picture.boxes():
        yield (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{_hex(colour)}"/>\n')
    yield "</g>\n</svg>\n"


def png(found: TagMap, title: str) -> bytes:
    """A PNG file. Raises UsageError where Pillow is not installed."""
    image_module, draw_module = _pillow()
    picture = Picture(found, title)
    image = image_module.new("RGB", (picture.width, picture.height), _BACKGROUND)
    draw = draw_module.Draw(image)
    for x, y, width, height, colour in picture.boxes():
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    for x, y, colour, name in picture.legend():
        draw.rectangle((x, y, x + 11, y + 11), fill=colour)
        draw.text((x + 15, y), name, fill=_INK)
    draw.text((_GAP_PIXELS, 10), _ascii(picture.title), fill=_INK)
    draw.text((_GAP_PIXELS, 60), NOTE, fill=_INK)
    for y, label in picture.labels():
        draw.text((_GAP_PIXELS, y - 2), label, fill=_INK)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise UsageError(
            f"a PNG needs the Python library Pillow, which is not here: {error}",
            hint="install it where mtetool is: pip install 'mtetool[pictures]'; or use svg",
        ) from error
    return Image, ImageDraw


def _svg_text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" fill="{_hex(_INK)}">{escape(text)}</text>\n'


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _ascii(text: str) -> str:
    """What Pillow's own font can draw."""
    return text.encode("ascii", "replace").decode()


def _short(n_bytes: int) -> str:
    granules = n_bytes // GRANULE_BYTES
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        n_bytes //= 1024
        if n_bytes < 1024 or unit == "TiB":
            break
    return f"{n_bytes} {unit} ({counted(granules, 'granule')})"
