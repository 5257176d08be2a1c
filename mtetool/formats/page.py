"""A report of tags as one page of HTML that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtetool.formats.picture import colour_of
from mtetool.formats.tagmap import MISSING, SHADES, TagMap
from mtetool.guest import Memslot
from mtetool.uapi import GRANULE_BYTES
from mtetool.words import printable

MOST_CELLS = 1 << 19
"""The most cells of the map in a page: its data then has 2 MiB."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a page shows. `changed` has, for each cell, the granules that differ from `against`."""

    name: str
    facts: Sequence[tuple[str, str]]
    slots: Sequence[Memslot]
    found: TagMap
    against: str | None = None
    changed: NDArray[np.int64] | None = None


def page(report: Report) -> Iterator[str]:
    """The page, in pieces."""
    template = (files("mtetool.formats") / "report.html").read_text("utf-8")
    parts = {
        "TITLE": _text(f"Tags of {report.name}"),
        "FACTS": "".join(_row(name, value) for name, value in _facts(report)),
        "SLOTS": "".join(_slot(slot) for slot in report.slots),
        "HISTOGRAM": "".join(_histogram(report)),
        # In a script, "</" would end it.
        "DATA": json.dumps(_data(report)).replace("</", "<\\/"),
    }
    for piece in template.split("{{"):
        name, braces, rest = piece.partition("}}")
        if braces:
            yield parts[name]
            yield rest
        else:
            yield piece


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield from report.facts
    counts = report.found.histogram()
    known = int(counts[:MISSING].sum())
    tagged = known - int(counts[0])
    share = f" ({tagged / known:.1%})" if known else ""
    yield "memory with known tags", _size(known)
    yield "of it tagged", _size(tagged) + share
    yield "tags missing", _size(int(counts[MISSING]))
    yield "scale of the map", f"a cell is {report.found.cell_bytes // 1024:,} KiB"
    if report.changed is not None:
        yield "compared with", str(report.against)
        yield "tags that differ", _size(int(report.changed.sum()))


def _histogram(report: Report) -> Iterator[str]:
    counts = report.found.histogram()
    most = max(int(counts[1:MISSING].max()), 1)
    known = max(int(counts[:MISSING].sum()), 1)
    for tag in range(1, MISSING):
        n_granules = int(counts[tag])
        colour = "#{:02x}{:02x}{:02x}".format(*colour_of(tag, SHADES))
        yield (
            f'<tr><th scope="row">{tag:x}</th><td class="n">{_size(n_granules)}</td>'
            f'<td class="n">{n_granules / known:.2%}</td><td class="bar"><span style="width:'
            f'{100 * n_granules / most:.1f}%;background:{colour}"></span></td></tr>\n'
        )


def _data(report: Report) -> dict[str, Any]:
    found = report.found
    codes, shades = found.codes()
    colours = [
        [colour_of(code, shade) for shade in range(SHADES + 1)] for code in range(MISSING + 1)
    ]
    changed = None
    if report.changed is not None:
        per_cell = found.cell_bytes // GRANULE_BYTES
        parts = np.ceil(report.changed * 15 / per_cell).astype(np.uint8)
        changed = _base64(parts)
    return {
        # Addresses as text: JavaScript's numbers have 53 bits.
        "extents": [[f"{e.ipa:x}", f"{e.size_bytes:x}"] for e in found.extents],
        "cellBytes": found.cell_bytes,
        "firsts": found.firsts,
        "cells": _base64(codes | shades << np.uint8(5)),
        "changed": changed,
        "colours": colours,
        "missing": MISSING,
    }


def _base64(values: NDArray[np.uint8]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _slot(slot: Memslot) -> str:
    cells = (str(slot.id), f"{slot.ipa:#x}", _size(slot.size_bytes // GRANULE_BYTES), slot.kind)
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>\n"


def _row(name: str, value: str) -> str:
    return f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>\n'


def _size(n_granules: int) -> str:
    value, unit = float(n_granules * GRANULE_BYTES), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if value == int(value) else f"{value:,.1f} {unit}"


def _text(text: str) -> str:
    return escape(printable(text))
