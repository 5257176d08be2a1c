"""Run in the lab: compare mtetool's walk of a guest's page tables with QEMU's own `gva2gpa`.

`python3 -m tests.lab.virtual PID QMP HALF EACH` stops the guest where QEMU sees that half of the
address space (0: a program runs, 1: the kernel), takes addresses from all that the guest maps, next
to it and anywhere (EACH of a kind, and EACH of any), and prints JSON: how many were compared, how
many are mapped, in pages or blocks of which sizes, and the first on which the two differ.
"""

from __future__ import annotations

import json
import random
import re
import socket
import sys
import time
from collections import Counter
from itertools import islice
from typing import Any

from mtetool.backends.kvm.guest import open_kvm
from mtetool.guest import AddressSpace, GuestOptions, Mapped

_MOST_PARTS = 1500
_AROUND = 8 << 20
_SEED = 7


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rwb")
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command, and return its answer."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, answer

    def human(self, line: str) -> str:
        """Run a command of the human monitor."""
        return str(self.ask("human-monitor-command", **{"command-line": line}))

    def physical(self, address: int) -> int | None:
        """What QEMU says that an address is mapped to."""
        answer = self.human(f"gva2gpa {address:#x}")
        found = re.search(r"gpa: (0x[0-9a-f]+|0)", answer)
        assert found or "Unmapped" in answer, answer
        return int(found[1], 16) if found else None


def stop_at(qmp: Qmp, half: int) -> str:
    """Stop the guest at the exception level at which QEMU sees that half."""
    for _ in range(200):
        qmp.ask("stop")
        registers = qmp.human("info registers")
        if f"EL{half}" in registers:
            return registers
        qmp.ask("cont")
        time.sleep(0.05)
    raise AssertionError(registers)


def addresses_of(
    space: AddressSpace, half: int, registers: str, each: int, chance: random.Random
) -> set[int]:
    """Addresses that are mapped, that are next to those, and any others."""
    start, end = ((1 << 64) - (1 << 48), 1 << 64) if half else (0, 1 << 48)
    known = {int(text, 16) for text in re.findall(r"=([0-9a-f]{16})", registers)}
    # All that is mapped would be too much: the first of it, and what the registers point at.
    windows = {start: end}
    for at in (at for at in known if start <= at < end):
        first = max(at // _AROUND * _AROUND, start)
        windows.setdefault(first, min(first + _AROUND, end))
    parts = [
        part
        for first, last in windows.items()
        for part in islice(space.parts(first, last), _MOST_PARTS)
    ]
    by_kind: dict[int, list[int]] = {}
    for part in parts:
        kind = part.block_bytes if isinstance(part, Mapped) else -part.size_bytes
        by_kind.setdefault(kind, []).append(part.address + chance.randrange(part.size_bytes))
    chosen: set[int] = set()
    for of_kind in by_kind.values():
        chosen.update(chance.sample(of_kind, min(each, len(of_kind))))
    for at in known:
        if at >> 55 & 1 == half:
            chosen.update((at + page * 4096) & ((1 << 64) - 1) for page in range(-8, 9))
    chosen.update(chance.randrange(start, end) for _ in range(each))
    return {at for at in chosen if start <= at < end}


def main() -> None:
    """Compare, and print the results."""
    pid, path, half = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    chance = random.Random(_SEED)  # noqa: S311 - reproducible
    qmp = Qmp(path)
    registers = stop_at(qmp, half)
    sizes: Counter[str] = Counter()
    differing = []
    with open_kvm(str(pid), GuestOptions(use_monitor=False)) as guest:
        (space,) = guest.address_spaces(0)
        addresses = sorted(addresses_of(space, half, registers, int(sys.argv[4]), chance))
        for address in addresses:
            (part,) = space.parts(address, address + 1)
            ours = part.ipa if isinstance(part, Mapped) else None
            theirs = qmp.physical(address)
            sizes[str(part.block_bytes if isinstance(part, Mapped) else "unmapped")] += 1
            if ours != theirs:
                why = "" if isinstance(part, Mapped) else str(part.error)
                differing.append((hex(address), ours and hex(ours), theirs and hex(theirs), why))
    qmp.ask("cont")
    result = {"n": len(addresses), "sizes": sizes, "differing": differing[:20]}
    print(json.dumps({**result, "n_differing": len(differing)}))


if __name__ == "__main__":
    main()
