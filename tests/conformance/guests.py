"""Guests of every backend, made in the same way, for the conformance suite."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mtetool.backends import open_guest
from mtetool.backends.emu.guest import create_emulated
from mtetool.guest import Guest, GuestOptions, Memslot

Slot = tuple[int, int, bool]
"""A memslot as a test requests it: address, size in bytes, read-only."""


class Factory(Protocol):
    """Makes guests of one backend with one page size, and ends them all."""

    page_size_bytes: int

    def __call__(self, slots: Sequence[Slot], mte: bool = True, vcpus: int = 0) -> Guest:
        """Return an opened guest; it ends with the test."""
        ...


def memslots(slots: Sequence[Slot]) -> tuple[Memslot, ...]:
    """Return the slots as numbered memslots."""
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
    `ready` once the VM is set up, and ends when its standard input does.
    """

    executable: str
    stack: ExitStack
    page_size_bytes: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))

    def __call__(self, slots: Sequence[Slot], mte: bool = True, vcpus: int = 0) -> Guest:
        words = [*([] if mte else ["--no-mte"]), "--vcpus", str(vcpus)]
        pid = _start(self.stack, [self.executable, *words, *_spelled(slots)])
        options = GuestOptions(memslots=memslots(slots))
        return self.stack.enter_context(open_guest(f"kvm:{pid}", options))


@dataclass
class ProcessGuests:
    """Processes that have just these slots as memory with tags, and no vCPUs.

    `executable` is called as `tagged --at [--no-mte] ADDRESS:SIZE[:ro] …`; otherwise it behaves
    like the test VMM.
    """

    executable: str
    stack: ExitStack
    page_size_bytes: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))

    def __call__(self, slots: Sequence[Slot], mte: bool = True, vcpus: int = 0) -> Guest:
        words = ["--at", *([] if mte else ["--no-mte"])]
        pid = _start(self.stack, [self.executable, *words, *_spelled(slots)])
        return self.stack.enter_context(open_guest(f"proc:{pid}"))


def _spelled(slots: Sequence[Slot]) -> list[str]:
    return [f"{ipa:#x}:{size:#x}{':ro' if ro else ''}" for ipa, size, ro in slots]


def _start(stack: ExitStack, command: list[str]) -> int:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(_end, process)
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line == b"ready", f"{command} printed {line!r}"
    return process.pid


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a VMM or a process, which must still be running: the tests let it live."""
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
    assert alive, f"it ended before its test, with status {status}"
    assert status == 0, f"it ended with status {status}"
