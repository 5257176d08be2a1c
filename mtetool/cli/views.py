"""Views of tags for people: a map, a grid of granules, and a summary before many rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from mtetool.cli.counts import head_lines, tag_lines
from mtetool.cli.progress import progress as shown_progress
from mtetool.cli.ranges import size
from mtetool.cli.render import put
from mtetool.cli.rows import text_lines, write_batches
from mtetool.flows.dump import OUTSIDE, RAW_MISSING, Line, lines
from mtetool.flows.stats import statistics
from mtetool.flows.tag_map import Cell, TagMap, cell_size
from mtetool.guest import Missing
from mtetool.sources.layout import total_bytes
from mtetool.sources.tally import Tally
from mtetool.sources.watching import Watched

if TYPE_CHECKING:
    from mtetool.cli.rows import Choice
    from mtetool.cli.screen import Screen
    from mtetool.guest import Extent
    from mtetool.sources.source import TagSource

LONG_ROWS = 1000
"""With more rows than that, a terminal shows a summary, and only the first of them."""

_ADDRESS_COLUMNS = 16
_MAP_LINES = 32
_MOST_CELLS = 64
# No tags, up to a quarter, up to a half, less than all, all; and some that cannot be read.
_ASCII, _BLOCKS = ".-+*#", "·░▒▓█"
_UNREADABLE = "?"
_COLOURS = (244, 30, 36, 172, 160)
_UNREADABLE_COLOUR = 199


def rows_on_terminal(
    source: TagSource, extents: list[Extent], choice: Choice, screen: Screen, progress: str
) -> Tally[Missing]:
    """Print rows; where there are many, a summary and the first of them."""
    missing: Tally[Missing] = Tally()
    most = choice.limit or LONG_ROWS
    if choice.each and choice.wanted is None and choice.limit is None:
        n_granules = total_bytes(extents) // 16
        if n_granules <= LONG_ROWS * _granules_per_line(screen):
            return print_grid(source, extents, screen)
    rows = list(islice(choice.rows(source, extents), most + 1))
    is_long = len(rows) > most
    if is_long and choice.limit is None:
        missing = _print_summary(source, extents, screen, progress)
        rows = rows[: max(screen.lines // 2, 4)]
    else:
        rows = rows[:most]
        for row in rows:
            if isinstance(row, Missing):
                missing.add(row)
    write_batches(text_lines(rows, choice, screen), "")
    if is_long:
        put(
            f"These are the first {len(rows):,} rows. --range, --at, --tag and --only-tagged choose"
            " others; a pipe or --limit gets more.\n"
        )
    return missing


def _print_summary(
    source: TagSource, extents: list[Extent], screen: Screen, progress: str
) -> Tally[Missing]:
    drawn = _new_map(source, extents, screen, max(screen.lines // 3, 4))
    with shown_progress(total_bytes(extents), f"reading {source.name}", progress) as advance:
        found = statistics(Watched(source, advance), extents, others=[drawn])
    for line in (*head_lines(found.total), "", *tag_lines(found.total, screen), ""):
        put(f"{line}\n")
    _print_drawn(drawn, screen)
    put("\n")
    return found.missing


def print_map(
    source: TagSource, extents: list[Extent], screen: Screen, progress: str
) -> Tally[Missing]:
    """Print a map of memory, a character for each cell."""
    missing: Tally[Missing] = Tally()
    n_lines = max(screen.lines - 4, 4) if screen.is_terminal else _MAP_LINES
    drawn = _new_map(source, extents, screen, n_lines)
    with shown_progress(total_bytes(extents), f"reading {source.name}", progress) as advance:
        for step in source.read(extents):
            if isinstance(step, Missing):
                missing.add(step)
            drawn.add(step)
            advance(step.size_bytes)
    _print_drawn(drawn, screen)
    return missing


def _new_map(source: TagSource, extents: Sequence[Extent], screen: Screen, n_lines: int) -> TagMap:
    room = screen.columns - _ADDRESS_COLUMNS
    columns = 1
    while columns * 2 <= min(room, _MOST_CELLS):
        columns *= 2
    cell_bytes = cell_size(extents, source.page_size_bytes, columns, n_lines)
    return TagMap(extents, cell_bytes, columns)


def _print_drawn(drawn: TagMap, screen: Screen) -> None:
    signs = _BLOCKS if screen.utf8 else _ASCII
    put(f"a cell is {size(drawn.cell_bytes)}, a line {size(drawn.cell_bytes * drawn.columns)}\n")
    legend = ("none", "<=25%", "<=50%", "<100%", "all")
    words = [f"{sign} {word}" for sign, word in zip(signs, legend, strict=True)]
    for line in _wrapped(["tagged:", *words, f"{_UNREADABLE} not read"], screen.columns):
        put(f"{line}\n")
    for row in drawn.rows():
        cells = "".join(_sign(cell, signs, screen) for cell in row.cells)
        put(f"{row.ipa:>#14x}  {cells}".rstrip() + "\n")


def _wrapped(words: list[str], columns: int) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + 2 + len(word) > columns:
            yield line
            line = ""
        line += f"{'  ' if line else ''}{word}"
    yield line


def _sign(cell: Cell | None, signs: str, screen: Screen) -> str:
    if cell is None:
        return " "
    if cell.missing:
        return screen.painted(_UNREADABLE, _UNREADABLE_COLOUR)
    if not cell.tagged:
        level = 0
    elif cell.tagged == cell.n_granules:
        level = 4
    else:
        level = 1 + sum(cell.tagged > cell.n_granules * part for part in (0.25, 0.5))
    return screen.painted(signs[level], _COLOURS[level])


# --- the grid -------------------------------------------------------------------------------


def _granules_per_line(screen: Screen) -> int:
    """As many as fit, a power of two, at most 16: then a line's address ends in 00."""
    n_granules = 16
    while n_granules > 1 and _grid_columns(n_granules) > screen.columns:
        n_granules //= 2
    return n_granules


def _grid_columns(n_granules: int) -> int:
    return _ADDRESS_COLUMNS + 2 * n_granules - 1 + (n_granules > 8)


def print_grid(source: TagSource, extents: list[Extent], screen: Screen) -> Tally[Missing]:
    """Print granules side by side; `*` stands for lines that are equal to the one before."""
    missing: Tally[Missing] = Tally()
    n_granules = _granules_per_line(screen)
    found = lines(source, extents, n_granules, missing)
    write_batches(_grid(found, n_granules * 16, screen), "")
    return missing


def _grid(found: Iterator[Line], length_bytes: int, screen: Screen) -> Iterator[str]:
    last: Line | None = None
    left_out = False
    for line in found:
        follows = last is not None and line.ipa == last.ipa + length_bytes
        if last is not None and follows and line.cells == last.cells:
            if not left_out:
                yield "*\n"
            left_out = True
        else:
            if last is not None and left_out:
                yield grid_line(last.ipa, last.cells, screen)
            left_out = False
            yield grid_line(line.ipa, line.cells, screen)
        last = line._replace(ipa=line.ipa + (line.n_lines - 1) * length_bytes)
        if line.n_lines > 1 and not left_out:
            yield "*\n"
            left_out = True
    if last is not None and left_out:
        yield grid_line(last.ipa, last.cells, screen)


def grid_line(ipa: int, cells: bytes, screen: Screen, marked: int | None = None) -> str:
    """A line of the grid; the granule with the number `marked` stands in brackets."""
    text = f"{ipa:>#14x} "
    for n, cell in enumerate(cells):
        before = "[" if n == marked else "]" if marked is not None and n == marked + 1 else " "
        middle = " " if n == 8 else ""
        text += (before + middle if before == "]" else middle + before) + _cell(
            cell, screen, marked=n == marked
        )
    if marked == len(cells) - 1:
        text += "]"
    return text.rstrip() + "\n"


def _cell(cell: int, screen: Screen, *, marked: bool) -> str:
    if cell == OUTSIDE:
        return " "
    if cell == RAW_MISSING:
        return screen.painted(_UNREADABLE, _UNREADABLE_COLOUR)
    return screen.tag(cell, marked=marked)


def grid_around(ipa: int, cells: bytes, marked_ipa: int, screen: Screen) -> Iterator[str]:
    """The grid of granules from `ipa` on, with one of them marked."""
    n_granules = _granules_per_line(screen)
    length_bytes = n_granules * 16
    start = ipa // length_bytes * length_bytes
    cells = bytes([OUTSIDE]) * ((ipa - start) // 16) + cells
    for first in range(0, len(cells), n_granules):
        here = cells[first : first + n_granules]
        line_ipa = start + first * 16
        if here.strip(bytes([OUTSIDE])):
            marked = (marked_ipa - line_ipa) // 16
            yield grid_line(line_ipa, here, screen, marked if 0 <= marked < n_granules else None)
