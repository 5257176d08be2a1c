"""`python -m tests.bench.relay [RUNS [MEMORY...]]`: what relays cost a live migration, in the lab.

Each migration of one guest runs directly, through `socat`, and through both relays, by turns. All
times are of an emulated CPU: compare them only with others of the same run.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any, Literal

from tests.lab.machine import Machine
from tests.lab.relays import Migration

_GUESTS = {"idle": "hammer.mib=4 hammer.pause=100000", "hammering": "hammer.mib=4 hammer.pause=1"}
Way = Literal["direct", "socat", "relays"]
_WAYS: tuple[Way, ...] = ("direct", "socat", "relays")


def measure(lab: Machine, memory: str, options: str, way: Way) -> dict[str, Any]:
    """Migrate a guest; return what QEMU says, and the relays' reports."""
    migration = Migration(lab, memory=memory, guest_options=options, timed=True)
    migration.start(way)
    found = migration.wait()
    assert found["status"] == "completed", found
    if way != "relays":
        return {"qemu": found}
    reports = migration.reports()
    used = [migration.usage(role) for role in ("source", "destination")]
    return {"qemu": found, **reports, "used": used}


def main() -> None:
    """Measure all, and print a table."""
    sizes = sys.argv[2:] or ["256M", "1G", "2G"]
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{'guest':20} {'way':8} {'downtime ms':>12} {'total ms':>10} {'MB/s':>7} {'held ms':>8}")
    with Machine(memory="8G", cpus=2) as lab:
        for memory in sizes:
            for name, options in _GUESTS.items():
                rows: dict[Way, list[dict[str, Any]]] = {way: [] for way in _WAYS}
                for _ in range(runs):
                    for way in _WAYS:
                        rows[way].append(measure(lab, memory, options, way))
                for way in _WAYS:
                    _print(f"{memory} {name}", way, rows[way])


def _print(guest: str, way: Way, rows: list[dict[str, Any]]) -> None:
    def median(key: str) -> float:
        return statistics.median(float(row["qemu"][key]) for row in rows)

    rate = statistics.median(
        row["qemu"]["ram"]["transferred"] / row["qemu"]["total-time"] / 1000 for row in rows
    )
    held = [row["source"]["held_seconds"] * 1000 for row in rows if "source" in row]
    print(
        f"{guest:20} {way:8} {median('downtime'):12.0f} {median('total-time'):10.0f} {rate:7.1f}"
        f" {statistics.median(held) if held else 0:8.0f}"
        f"   downtimes {sorted(row['qemu']['downtime'] for row in rows)}",
        flush=True,
    )
    for number, role in enumerate(("source", "destination")):
        used = [row["used"][number] for row in rows if "used" in row]
        if used:
            seconds, most = (statistics.median(values) for values in zip(*used, strict=True))
            print(f"{'':20} {role}: {seconds:.1f} s of CPU time, {most / (1 << 20):.0f} MiB")


if __name__ == "__main__":
    main()
