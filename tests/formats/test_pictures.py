"""Maps of memory, as pictures and in a page."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mtetool.formats.picture import MOST_CELLS, colour_of
from mtetool.formats.tagmap import MISSING, SHADES, TagMap, cell_bytes_for
from mtetool.guest import Extent, Memslot
from tests.cli.running import BASE, KIB, make_guest, run, set_tag

_SLOTS = (Memslot(0, BASE, 4096 * KIB), Memslot(1, 2 * BASE, 64 * KIB))


@pytest.fixture
def guest(tmp_path: Path) -> str:
    """Two slots: one page of 7, half a page of 12, and a page that cannot be read."""
    name = make_guest(tmp_path / "guest", slots=_SLOTS)
    set_tag(tmp_path / "guest", BASE + 4 * KIB, 4 * KIB, 7)
    set_tag(tmp_path / "guest", 2 * BASE, 2 * KIB, 12)
    hole = f"EFAULT,on=read,at={2 * BASE + 8 * KIB:#x}"
    assert run("emu", "fault", tmp_path / "guest", "--fault", hole).status == 0
    return name


def test_a_png_has_the_colours_of_tags(guest: str) -> None:
    done = run("dump", guest, "--every-page", "--output", "png")
    assert done.status == 3
    image = Image.open(io.BytesIO(done.raw)).convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(1 << 24) or ()}
    # A cell has 16 pixels, a square of the legend 144.
    assert colours[colour_of(7, SHADES)] == 16 + 144
    assert colours[colour_of(12, SHADES // 2)] == 16
    assert image.width < 1300


def test_an_svg_has_them_too_and_an_axis(guest: str) -> None:
    done = run("dump", guest, "--every-page", "--output", "svg")
    tree = ElementTree.fromstring(done.out)  # noqa: S314 - our own
    texts = [item.text for item in tree.iter() if item.tag.endswith("text")]
    assert f"{BASE:#x}" in texts
    assert f"{2 * BASE:#x}" in texts
    assert any("a cell is 4 KiB" in (text or "") for text in texts)
    wanted = "#{:02x}{:02x}{:02x}".format(*colour_of(7, SHADES))
    assert sum(item.get("fill") == wanted for item in tree.iter()) == 2


def test_names_cannot_break_out_of_pictures_and_pages(tmp_path: Path) -> None:
    (tmp_path / "<").mkdir()
    make_guest(tmp_path / "<" / "script><x>&", seed=3)
    name = f"emu:{tmp_path}/</script><x>&"
    ElementTree.fromstring(run("dump", name, "--output", "svg").out)  # noqa: S314
    assert run("report", name, "-o", tmp_path / "r.html").status == 0
    assert "<x>" not in (tmp_path / "r.html").read_text()


def test_a_large_guest_has_larger_cells(tmp_path: Path) -> None:
    run("emu", "create", tmp_path / "big", "--memory", "1T")
    done = run("dump", f"emu:{tmp_path / 'big'}", "--output", "svg")
    assert done.status == 0
    assert "a cell is 8 MiB" in done.out
    assert len(done.out) < 1 << 20


@given(
    st.lists(st.tuples(st.integers(1, 1 << 30), st.integers(1, 1 << 20)), min_size=1, max_size=20)
)
def test_scales_fit(sizes: list[tuple[int, int]]) -> None:
    at, extents = 0, []
    for gap, size in sizes:
        extents.append(Extent(at + gap * 4096, size * 4096))
        at = extents[-1].end
    found = TagMap(extents, cell_bytes_for(extents, 4096))
    assert found.n_cells <= 4096 + len(extents)
    for extent in extents:
        assert found.cell_at(extent.end - 1) + 1 in found.firsts


@given(st.data())
def test_cells_count_every_granule(data: st.DataObject) -> None:
    extents = [Extent(0x10000, 0x5000), Extent(0x15000, 0x3000)]
    found = TagMap(extents, 4096 << data.draw(st.integers(0, 2)))
    tags = np.frombuffer(data.draw(st.binary(min_size=1280, max_size=1280)), np.uint8) & 15
    found.add_tags(0x10000, tags[:1000].tobytes())
    found.add_tags(0x10000 + 16000, tags[1000:].tobytes())
    found.add(0x15000, 0x2FF0, 5)
    found.add(0x15000 + 0x2FF0, 16, MISSING)
    wanted = np.bincount(tags, minlength=17)
    wanted[5] += 0x2FF
    wanted[MISSING] += 1
    assert found.histogram().tolist() == wanted.tolist()


def data_of(path: Path) -> Any:
    """What a page's script reads."""
    text = path.read_text()
    match = re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_a_report_marks_what_differs(guest: str, tmp_path: Path) -> None:
    other = make_guest(tmp_path / "other", slots=_SLOTS[:1])
    set_tag(tmp_path / "other", BASE + 4 * KIB, 4 * KIB, 7)
    set_tag(tmp_path / "other", BASE + 64 * KIB, 16, 1)
    words = ("--against", other, "--every-page", "-o", tmp_path / "r.html")
    assert run("report", guest, *words).status == 3
    data = data_of(tmp_path / "r.html")
    changed = base64.b64decode(data["changed"])
    cells = base64.b64decode(data["cells"])
    assert (data["cellBytes"], len(cells)) == (4096, 1024 + 16)
    assert cells[1] == 7 | SHADES << 5
    assert cells[1024] & 31 == 12
    assert cells[1026] & 31 == MISSING
    # One granule; and all of the slot that only one of them has, but the page that is missing.
    assert [at for at, part in enumerate(changed) if part] == [16, 1024, 1025, *range(1027, 1040)]


def test_pages_and_pictures_are_not_for_everything(tmp_path: Path) -> None:
    slots = tuple(Memslot(n, BASE + n * 2 * 4096, 4096) for n in range(257))
    guest = make_guest(tmp_path / "guest", slots=slots)
    for words in (("dump", guest, "--output", "png"), ("report", guest, "-o", tmp_path / "r")):
        done = run(*words)
        assert (done.status, "--range" in done.err) == (2, True)
    assert run("dump", guest, "--output", "svg", "--granules").status == 2
    assert not (tmp_path / "r").exists()
    assert MOST_CELLS >= 1 << 18
