"""The real command line, in this process (fast) or in one of its own, on emulated guests."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mtetool.__main__ import main
from mtetool.backends import open_guest
from mtetool.backends.emu.guest import EmulatedGuest, create_emulated
from mtetool.errors import BusyError
from mtetool.guest import Memslot
from mtetool.tags import Tags
from mtetool.uapi import GRANULE_BYTES
from tests.jsonkeys import check_keys

BASE = 0x4000_0000
ROM = 0x1000_0000
KIB = 1024
SLOTS = (
    Memslot(1, ROM, 64 * KIB, readonly=True, kind="rom"),
    Memslot(0, BASE, 512 * KIB),
    Memslot(2, BASE + 1024 * KIB, 256 * KIB),
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: its status, and what it wrote."""

    status: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def json(self) -> Any:
        """The report of a run with --json, its keys checked against its page."""
        report = json.loads(self.raw)
        check_keys(report)
        return report

    @property
    def error(self) -> Any:
        """The error of a run with --json, its keys checked against mtetool(1)."""
        error = json.loads(self.err.splitlines()[-1])
        check_keys(error)
        return error


class _Stream(io.TextIOWrapper):
    def __init__(self, data: bytes = b"") -> None:
        self.bytes = io.BytesIO(data)
        super().__init__(self.bytes, encoding="utf-8", write_through=True)


@contextmanager
def _streams(stdin: bytes, argv: list[str]) -> Iterator[tuple[_Stream, _Stream]]:
    before = sys.stdin, sys.stdout, sys.stderr, sys.argv
    out, err = _Stream(), _Stream()
    sys.stdin, sys.stdout, sys.stderr, sys.argv = _Stream(stdin), out, err, argv
    try:
        yield out, err
    finally:
        sys.stdin, sys.stdout, sys.stderr, sys.argv = before


def run(*arguments: str | Path, stdin: bytes = b"") -> Outcome:
    """Run `mtetool ARGUMENTS` in this process."""
    with _streams(stdin, ["mtetool", *map(str, arguments)]) as (out, err):
        status = main()
        return Outcome(status, out.bytes.getvalue(), err.bytes.getvalue().decode())


def run_onto(stdout: TextIO, *arguments: str | Path, stdin: TextIO | None = None) -> Outcome:
    """As `run`, with a standard output and input that have descriptors; close them."""
    with _streams(b"", ["mtetool", *map(str, arguments)]) as (_, err), stdout:
        sys.stdout, sys.stdin = stdout, stdin or sys.stdin
        with stdin or nullcontext():
            status = main()
        return Outcome(status, b"", err.bytes.getvalue().decode())


def command(*arguments: str | Path) -> list[str]:
    """The words that start `mtetool ARGUMENTS` in a process of its own."""
    return [sys.executable, "-m", "mtetool", *map(str, arguments)]


def spawn(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start `mtetool ARGUMENTS` in a process of its own."""
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(command(*arguments), env=environment, **options)


def make_guest(
    path: Path,
    seed: int | None = None,
    *,
    slots: tuple[Memslot, ...] = SLOTS,
    page_size_bytes: int = 4096,
    mte: bool = True,
    vcpus: int = 1,
) -> str:
    """Make an emulated guest with tags from `seed` (None: all 0); return its name for mtetool."""
    create_emulated(
        str(path), page_size_bytes=page_size_bytes, memslots=slots, mte=mte, vcpus=vcpus
    )
    if seed is not None:
        random = np.random.default_rng(seed)
        for slot in slots:
            if slot.kind == "device":
                continue
            tags = np.zeros(slot.size_bytes // GRANULE_BYTES, dtype=np.uint8)
            tags[: tags.size // 2] = np.repeat(
                random.integers(0, 16, tags.size // 16, dtype=np.uint8), 8
            )
            # Only the owner can tag read-only slots, and the owner sets runs of tags.
            if slot.readonly or slot.kind == "rom":
                set_tag(path, slot.ipa, slot.size_bytes, seed % 16)
            else:
                write(path, slot.ipa, tags)
    return f"emu:{path}"


def write(path: Path, ipa: int, tags: Tags) -> None:
    with open_guest(f"emu:{path}") as guest:
        assert guest.write_tags(ipa, tags) == tags.size * GRANULE_BYTES


def set_tag(path: Path, ipa: int, size_bytes: int, tag: int) -> None:
    """Set a tag as the guest's owner can: in single granules and read-only memory, too.

    A command that follows the guest has it open now and then, for a moment.
    """
    deadline = time.monotonic() + 30
    while True:
        try:
            with open_guest(f"emu:{path}") as guest:
                assert isinstance(guest, EmulatedGuest)
                guest.owner.set_tag(ipa, size_bytes, tag)
        except BusyError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return


def tags_of(path: Path, slot: Memslot) -> Tags:
    tags = np.zeros(slot.size_bytes // GRANULE_BYTES, dtype=np.uint8)
    with open_guest(f"emu:{path}") as guest:
        assert guest.read_tags(slot.ipa, tags) == slot.size_bytes
    return tags


def same_tags(a: Path, b: Path, slots: tuple[Memslot, ...] = SLOTS) -> bool:
    return all(np.array_equal(tags_of(a, slot), tags_of(b, slot)) for slot in slots)
