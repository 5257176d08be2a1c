"""A guest saved to bytes, and loaded from them, by the functions that the commands call."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mtetool.backends.emu.guest import create_emulated
from mtetool.errors import MtetoolError
from mtetool.guest import GuestOptions, Memslot
from mtetool.relay.guests import Wanted
from mtetool.relay.loading import load
from mtetool.relay.report import News, Report
from mtetool.relay.saved import SavedReader
from mtetool.relay.saving import open_source, save
from mtetool.tags import Tags
from tests.cli.running import tags_of, write
from tests.relay import streams
from tests.relay.migrating import BASE, N_PAGES, TAIL, beginning, pages

SLOT = Memslot(0, BASE, N_PAGES * 4096, readonly=False, kind="ram")
MEMORY = beginning(return_path=False) + streams.part(pages(range(N_PAGES)))
MEMORY += streams.command(11) + streams.end(pages([3, 4]))
STREAM = MEMORY + TAIL


def guest(
    path: Path, tags: Tags | None = None, *, page: int = 4096, mte: bool = True, n_pages: int = 0
) -> Path:
    """Make an emulated guest, with tags from its first page on."""
    size = (n_pages or N_PAGES) * 4096
    slots = (Memslot(0, BASE, size, readonly=False, kind="ram"),)
    create_emulated(str(path), page_size_bytes=page, memslots=slots, mte=mte, vcpus=0)
    if tags is not None:
        write(path, BASE, tags)
    return path


def some_tags() -> Tags:
    """Tags of half of the pages; the others have none."""
    tags = np.random.default_rng(1).integers(0, 16, (N_PAGES, 256), dtype=np.uint8)
    tags[1::2] = 0
    return tags.ravel()


def wanted(path: Path) -> Wanted:
    return Wanted(f"emu:{path}", GuestOptions())


def saved(path: Path, stream: bytes = STREAM, said: list[str] | None = None) -> bytes:
    """Save a guest whose QEMU sends this stream; return the file."""
    out = io.BytesIO()
    save_to(out, path, stream, said)
    return out.getvalue()


def save_to(
    out: io.BytesIO, path: Path, stream: bytes = STREAM, said: list[str] | None = None
) -> Report:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as end:
        end.write(stream)  # less than a pipe holds
    try:
        news = News((said if said is not None else []).append)
        return save(reading, out, open_source(reading, wanted(path)), news)
    finally:
        os.close(reading)


@dataclass
class Loaded:
    """What came of a load: what QEMU got, and the error or the report."""

    passed: bytearray = field(default_factory=bytearray)
    error: MtetoolError | None = None
    report: Report | None = None


def loaded(path: Path, data: bytes, before: int = 0, into: Loaded | None = None) -> Loaded:
    """Load a file into a guest; `before` of its bytes were read already."""
    found = into or Loaded()
    file = path.with_suffix(".file")
    file.write_bytes(data)
    reading, writing = os.pipe()

    def read() -> None:
        while piece := os.read(reading, 1 << 16):
            found.passed += piece

    qemu = threading.Thread(target=read)
    qemu.start()
    fd = os.open(file, os.O_RDONLY)
    try:
        reader = SavedReader(fd, "standard input", os.read(fd, before))
        found.report = load(reader, writing, wanted(path), News())
    except MtetoolError as error:
        found.error = error
    finally:
        os.close(fd)
        os.close(writing)
        qemu.join()
        os.close(reading)
    return found


def tags(path: Path) -> Tags:
    return tags_of(path, SLOT)
