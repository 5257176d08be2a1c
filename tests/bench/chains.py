"""`python -m tests.bench.chains`: scattered pages by chains of calls, one by one, and by a C loop.

The loop is `tests/lab/programs/copyloop.c`: the same ioctls, made by a VMM itself. All times are of
an emulated CPU: compare them only with others of the same run.
"""

from __future__ import annotations

import json
import statistics

from tests.lab.guests import Qemu
from tests.lab.machine import Machine

_MIB = 256
_PAGES = (1, 100, 3000)
_ROUNDS = 5
_PAGE_BYTES = 4096

# Microseconds a page: chained reads, chained writes with their read-backs, single reads.
_OURS = """
import json, sys, time
import numpy as np
from mtetool.backends import open_guest
pid, mib, counts, rounds = sys.argv[1], *map(json.loads, sys.argv[2:])
chance = np.random.default_rng(1)
rows = []
with open_guest(f"kvm:{pid}") as guest:
    guest.info()
    for count in counts:
        # The same in all rounds: only the first finds pages that are not there yet.
        pages = chance.choice(mib << 8, count, replace=False).astype(np.uint64)
        extents = np.stack([0x40000000 + (pages << 12), np.full(count, 4096)], 1)
        extents = extents.astype(np.uint64)
        for _ in range(rounds + 1):
            tags, found = (np.zeros(count * 256, np.uint8) for _ in range(2))
            start = time.perf_counter()
            assert guest.read_scattered(extents, tags) == count * 4096
            read = time.perf_counter()
            assert guest.write_scattered(extents, tags) == count * 4096
            wrote = time.perf_counter()
            for ipa, _ in extents[:300].tolist():
                assert guest.read_tags(ipa, found[:256]) == 4096
            single = (time.perf_counter() - wrote) / min(count, 300) * count
            rows.append([count, read - start, wrote - read, single])
print(json.dumps(rows))
"""


def main() -> None:
    """Boot, measure, print a table."""
    with Machine() as lab:
        guest = Qemu(lab, "guest").start()
        guest.wait_for_checks()
        guest.qmp("stop")
        command = ["python3", "-c", _OURS, str(guest.pid), str(_MIB), str([*_PAGES]), str(_ROUNDS)]
        env = {"PYTHONPATH": "/opt/mtetool"}
        rows = json.loads(lab.run(command, env=env, check=True, timeout=600).stdout)
        print(f"{'us a page, median of ' + str(_ROUNDS):24} {'read':>20} {'write, read back':>24}")
        print(
            f"{'pages':>8} {'one by one':>15} {'chain':>8} {'C':>7} {'':>5} {'chain':>8} {'C':>7}"
        )
        for count in _PAGES:
            # The first round lays the frames and loads what the others find loaded.
            ours = [row[1:] for row in rows if row[0] == count][1:]
            read, wrote, single = (
                statistics.median(column) * 1e6 / count for column in zip(*ours, strict=True)
            )
            c_read, c_write = _loop(lab, count)
            print(
                f"{count:8} {single:15.0f} {read:8.1f} {c_read:7.1f} ({read / c_read:4.2f})"
                f" {wrote:8.1f} {c_read + c_write:7.1f} ({wrote / (c_read + c_write):4.2f})",
                flush=True,
            )


def _loop(lab: Machine, count: int) -> tuple[float, float]:
    """Microseconds a page of the C loop: reading, writing."""
    words = ["/lab/copyloop", str(_MIB), str(_ROUNDS + 1), str(_PAGE_BYTES), str(count)]
    printed = lab.run(words, check=True, timeout=300).stdout
    rows = [[float(word) for word in line.split()] for line in printed.splitlines()][1:]
    read, write = (statistics.median(column) * 1e6 / count for column in zip(*rows, strict=True))
    return read, write


if __name__ == "__main__":
    main()
