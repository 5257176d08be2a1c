"""Guests of every backend, made alike: what the conformance suite is run on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mtetool.backends import GuestOptions, open_guest
from mtetool.backends.base import Guest
from mtetool.backends.emulator import create_emulated
from mtetool.guest import Memslot

Slot = tuple[int, int, bool]
"""A memslot as a test wants it: address, size in bytes, read-only."""


class Factory(Protocol):
    """Makes guests of one backend with one page size, and ends them all."""

    page_size_bytes: int

    def __call__(self, slots: Sequence[Slot], mte: bool = True, vcpus: int = 0) -> Guest:
        """A guest that was opened; it ends with the test."""
        ...


def memslots(slots: Sequence[Slot]) -> tuple[Memslot, ...]:
    """The slots as the protocol has them, numbered."""
    return tuple(
        Memslot(number, ipa, size_bytes, readonly, "rom" if readonly else "ram")
        for number, (ipa, size_bytes, readonly) in enumerate(slots)
    )


@dataclass
class EmulatedGuests:
    """Guests in files."""

    directory: Path
    page_size_bytes: int
    stack: ExitStack
    made: int = field(default=0)

    def __call__(self, slots: Sequence[Slot], mte: bool = True, vcpus: int = 0) -> Guest:
        path = self.directory / f"guest{self.made}"
        self.made += 1
        create_emulated(
            str(path),
            page_size_bytes=self.page_size_bytes,
            memslots=memslots(slots),
            mte=mte,
            vcpus=vcpus,
        )
        return self.stack.enter_context(open_guest(f"emu:{path}"))


@dataclass
class RealGuests:
    """VMs of the real kernel, each in a process of the test VMM.

    `executable` is called as `testvmm [--no-mte] [--vcpus N] IPA:SIZE[:ro] …`; it prints
    `ready` once the VM stands, and ends when its standard input does.
    """

    executable: str
    stack: ExitStack
    page_size_bytes: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))

    def __call__(self, slots: Sequence[Slot], mte: bool = True, vcpus: int = 0) -> Guest:
        command = [self.executable, *([] if mte else ["--no-mte"]), "--vcpus", str(vcpus)]
        command += [f"{ipa:#x}:{size:#x}{':ro' if ro else ''}" for ipa, size, ro in slots]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.stack.callback(_end, process)
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line == b"ready", f"{command} said {line!r}"
        options = GuestOptions(memslots=memslots(slots))
        return self.stack.enter_context(open_guest(f"kvm:{process.pid}", options))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a VMM. It must still be there: whoever borrowed from it let it live."""
    alive = process.poll() is None
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        status = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()
    assert alive, f"the VMM ended before its test, with status {status}"
    assert status == 0, f"the VMM ended with status {status}"
