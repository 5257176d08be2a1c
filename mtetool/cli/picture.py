"""`mtetool dump --output png|svg`: a map of memory on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtetool.files.output import output_file
from mtetool.formats.picture import MOST_CELLS, png, svg
from mtetool.formats.tagmap import MISSING, tag_map
from mtetool.guest import Extent, Missing
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.sources.source import TagSource


def draw(source: TagSource, extents: Sequence[Extent], form: str) -> Tally[Missing]:
    """Draw the tags of extents; return what could not be read, as one range."""
    found = tag_map(source, extents, MOST_CELLS)
    title = f"tags of {source.name}"
    with output_file("-", force=False) as out:
        if form == "png":
            out.write(png(found, title))
        else:
            for part in svg(found, title):
                out.write(part.encode("utf-8", "backslashreplace"))
    missing: Tally[Missing] = Tally()
    if n_granules := int(found.histogram()[MISSING]):
        missing.add(Missing(extents[0].ipa, n_granules * GRANULE_BYTES, None, "not read"))
    return missing
