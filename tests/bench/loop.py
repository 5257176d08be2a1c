"""mtetool compared with a program that does only the same ioctls, on a live guest in the lab.

All times are of an emulated CPU: compare them only with others of the same run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.bench.model import Action, Beside
from tests.lab.guests import Qemu
from tests.lab.machine import Machine

_MIB = 1024
_BASE = "0x40000000"


def beside_the_loop(n_rounds: int) -> list[Beside]:
    """Save and restore 1 GiB of a QEMU guest, with a heap's tags, in turn with the bare loop.

    The loop is `tests/lab/programs/copyloop.c`, on memory of its own of the same size, tagged all
    over. mtetool's time is from its first copy to the end of its last.
    """
    found = {action: Beside(action, _MIB << 20) for action in ("save", "restore")}
    with Machine(memory="6G") as lab:
        guest = Qemu(lab, "large", memory=f"{_MIB}M").start()
        guest.wait_for_checks(1)
        guest.qmp("stop")
        lab.sh(
            f"mtetool emu create /root/e --memory {_MIB}M --fill heap"
            " && mtetool save emu:/root/e -o /root/r --every-page"
            f" && mtetool restore /root/r kvm:{guest.pid} --every-page"
            f" --memslot {_BASE}:{_MIB}M",
            timeout=300,
        )
        # The first round loads what the others find loaded; it does not count.
        for number in range(n_rounds + 1):
            for action, took, bare in _round(lab, f"kvm:{guest.pid}"):
                if number:
                    found[action].runs.append((took, bare))
    return list(found.values())


def _round(lab: Machine, guest: str) -> Iterator[tuple[Action, float, float]]:
    whole = f"{_BASE}:{_MIB}M"
    read, _ = _loop(lab)
    yield "save", _mtetool(lab, "save", guest, "-o", "/root/s", "--force", "--range", whole), read
    yield "restore", _mtetool(lab, "restore", "/root/s", guest), sum(_loop(lab))


def _loop(lab: Machine) -> tuple[float, float]:
    printed = lab.run(["/lab/copyloop", str(_MIB), "1"], check=True, timeout=300).stdout
    read, write = (float(word) for word in printed.split())
    return read, write


def _mtetool(lab: Machine, *words: str) -> float:
    report = lab.run(["mtetool", *words, "--json"], check=True, timeout=300).stdout
    seconds: float = json.loads(report)["copy_seconds"]
    return seconds
