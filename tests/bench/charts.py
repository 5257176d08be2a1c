"""Charts as SVG: bars in groups and lines, readable on light and dark backgrounds.

Only what the report needs. Coordinates are pixels; there are two panels in a row.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 30, 44
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_HEAD, _LEGEND = 34, 26
_COLUMNS = 2

# Distinct to most eyes, of medium brightness (after Okabe and Ito).
_COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#8a7fb0", "#888888")

_STYLE = """
  svg { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
  .ground { fill: #ffffff; } .ink { fill: #1f2328; } .faint { fill: #59636e; }
  .grid { stroke: #d1d9e0; } .axis { stroke: #59636e; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; } .ink { fill: #e6edf3; } .faint { fill: #9198a1; }
    .grid { stroke: #30363d; } .axis { stroke: #9198a1; }
  }
"""


@dataclass(frozen=True, slots=True)
class BarPanel:
    """Groups of bars from 0 on: each series has a value for each group, or None."""

    title: str
    unit: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float | None]]

    @property
    def names(self) -> list[str]:
        """The names of the series."""
        return list(self.series)

    def draw(self, colours: Mapping[str, str]) -> Iterator[str]:
        """Draw the inside of the panel, from its upper left corner."""
        values = [value for row in self.series.values() for value in row if value is not None]
        top = yield from _frame(self.title, self.unit, max(values, default=1))
        group_width = _PLOT_WIDTH / max(1, len(self.groups))
        bar_width = 0.84 * group_width / max(1, len(self.series))
        for number, group in enumerate(self.groups):
            left = _LEFT + (number + 0.08) * group_width
            yield _words(_LEFT + (number + 0.5) * group_width, _HEIGHT - _BOTTOM + 17, group)
            for place, (name, row) in enumerate(self.series.items()):
                value = row[number]
                if value is None:
                    continue
                height = _PLOT_HEIGHT * value / top
                x, y = left + place * bar_width, _HEIGHT - _BOTTOM - height
                yield (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar_width - 1:.1f}"'
                    f' height="{height:.1f}" fill="{colours[name]}">'
                    f"<title>{escape(f'{group}, {name}: {value:.4g} {self.unit}')}</title></rect>"
                )


@dataclass(frozen=True, slots=True)
class LinePanel:
    """Lines through points; both axes begin at 0."""

    title: str
    x_unit: str
    unit: str
    series: Mapping[str, Sequence[tuple[float, float]]]

    @property
    def names(self) -> list[str]:
        """The names of the series."""
        return list(self.series)

    def draw(self, colours: Mapping[str, str]) -> Iterator[str]:
        """Draw the inside of the panel, from its upper left corner."""
        points = [point for row in self.series.values() for point in row]
        top = yield from _frame(self.title, self.unit, max((y for _, y in points), default=1))
        right = max((x for x, _ in points), default=1)
        for x in sorted({x for x, _ in points}):
            at = _LEFT + _PLOT_WIDTH * x / right
            yield _words(at, _HEIGHT - _BOTTOM + 17, f"{x:g}")
        yield _words(_LEFT + _PLOT_WIDTH / 2, _HEIGHT - 8, self.x_unit, kind="faint")
        for name, row in self.series.items():
            places = [
                (
                    _LEFT + _PLOT_WIDTH * x / right,
                    _HEIGHT - _BOTTOM - _PLOT_HEIGHT * y / top,
                    f"{name}, {x:g} {self.x_unit}: {y:.4g} {self.unit}",
                )
                for x, y in row
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
            colour = colours[name]
            yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
            for x, y, words in places:
                yield (
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
                    f"<title>{escape(words)}</title></circle>"
                )


Panel = BarPanel | LinePanel


def document(title: str, panels: Sequence[Panel]) -> str:
    """An SVG with a title, one legend for all panels, and the panels."""
    rows = math.ceil(len(panels) / _COLUMNS)
    width, height = _COLUMNS * _WIDTH, _HEAD + _LEGEND + rows * _HEIGHT
    names = list(dict.fromkeys(name for panel in panels for name in panel.names))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}"/>',
        f'<text class="ink" x="16" y="24" font-size="16" font-weight="600">{escape(title)}</text>',
        *_legend(colours),
    ]
    for number, panel in enumerate(panels):
        x = number % _COLUMNS * _WIDTH
        y = _HEAD + _LEGEND + number // _COLUMNS * _HEIGHT
        lines += [f'<g transform="translate({x} {y})">', *panel.draw(colours), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def _legend(colours: Mapping[str, str]) -> Iterator[str]:
    x = 16.0
    for name, colour in colours.items():
        yield f'<rect x="{x:.0f}" y="{_HEAD + 2}" width="12" height="12" fill="{colour}"/>'
        yield _words(x + 18, _HEAD + 12, name, anchor="start")
        x += 42 + 6.8 * len(name)


def _frame(title: str, unit: str, largest: float) -> Generator[str, None, float]:
    """Draw title, axes and grid; return the value at the upper end."""
    step = _step(largest)
    n_steps = max(1, math.ceil(largest / step))
    yield _words(_LEFT, 14, title, anchor="start", extra=' font-weight="600"')
    middle = _TOP + _PLOT_HEIGHT / 2
    yield _words(13, middle, unit, kind="faint", extra=f' transform="rotate(-90 13 {middle:.0f})"')
    for number in range(n_steps + 1):
        y = _HEIGHT - _BOTTOM - _PLOT_HEIGHT * number / n_steps
        kind = "grid" if number else "axis"
        yield (
            f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        yield _words(_LEFT - 6, y + 4, f"{number * step:g}", kind="faint", anchor="end")
    return n_steps * step


def _step(largest: float) -> float:
    """Return 1, 2 or 5 times a power of ten, such that four to eight steps fit."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(f * power for f in (1, 2, 5, 10) if largest / (f * power) <= 8)


def _words(
    x: float, y: float, text: str, *, kind: str = "ink", anchor: str = "middle", extra: str = ""
) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>'
        f"{escape(text)}</text>"
    )
