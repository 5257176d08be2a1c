"""`python -m tests.bench.relay [RUNS [MEMORY...]]`: what relays cost a live migration, in the lab.

Each migration of one guest runs directly, through `socat`, and through both relays, by turns. All
times are of an emulated CPU: compare them only with others of the same run. The figures go to
`results/relay.json`, which keeps those of other sizes, their chart to `results/relay.svg`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tests.bench.charts import BarPanel, document
from tests.lab.machine import Machine
from tests.lab.relays import Migration

_GUESTS = {"idle": "hammer.mib=4 hammer.pause=100000", "hammering": "hammer.mib=4 hammer.pause=1"}
Way = Literal["direct", "socat", "relays"]
_WAYS: tuple[Way, ...] = ("direct", "socat", "relays")
_RESULTS = Path(__file__).parent / "results"
_HELD = "relays, of it held for tags"


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
    """Measure all, print a table, and keep the figures."""
    sizes = sys.argv[2:] or ["256M", "1G", "2G"]
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    kept = [row for row in _kept() if row["memory"] not in sizes]
    rows: list[dict[str, Any]] = []
    print(f"{'guest':20} {'way':8} {'downtime ms':>12} {'total ms':>10} {'MB/s':>7} {'held ms':>8}")
    with Machine(memory="8G", cpus=2) as lab:
        for memory in sizes:
            for name, options in _GUESTS.items():
                found: dict[Way, list[dict[str, Any]]] = {way: [] for way in _WAYS}
                for _ in range(runs):
                    for way in _WAYS:
                        found[way].append(measure(lab, memory, options, way))
                for way in _WAYS:
                    rows.append({"memory": memory, "guest": name, "way": way, **_row(found[way])})
                    _print(rows[-1])
                _keep([*kept, *rows])


def _kept() -> list[dict[str, Any]]:
    path = _RESULTS / "relay.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def _keep(rows: Sequence[dict[str, Any]]) -> None:
    _RESULTS.joinpath("relay.json").write_text(json.dumps(rows, indent=1) + "\n")
    _RESULTS.joinpath("relay.svg").write_text(chart(rows))


def _row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and all downtimes: times in milliseconds."""
    qemu = [row["qemu"] for row in rows]
    rates = [said["ram"]["transferred"] / said["total-time"] / 1000 for said in qemu]
    held = [row["source"]["held_seconds"] * 1000 for row in rows if "source" in row]
    return {
        "runs": len(rows),
        "downtime": statistics.median(said["downtime"] for said in qemu),
        "downtimes": sorted(said["downtime"] for said in qemu),
        "total": statistics.median(said["total-time"] for said in qemu),
        "megabytes_per_second": statistics.median(rates),
        "held": statistics.median(held) if held else None,
        "used": _used([row["used"] for row in rows if "used" in row]),
    }


def _used(rows: Sequence[Sequence[tuple[float, int]]]) -> dict[str, list[float]]:
    """Of each role, the medians of the seconds of CPU time and of the bytes of memory."""
    found = {}
    for number, role in enumerate(("source", "destination")):
        pairs = [row[number] for row in rows]
        if pairs:
            found[role] = [statistics.median(values) for values in zip(*pairs, strict=True)]
    return found


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['memory'] + ' ' + row['guest']:20} {row['way']:8} {row['downtime']:12.0f}"
        f" {row['total']:10.0f} {row['megabytes_per_second']:7.1f} {row['held'] or 0:8.0f}"
        f"   downtimes {row['downtimes']}",
        flush=True,
    )
    for role, (seconds, most) in row["used"].items():
        print(f"{'':20} {role}: {seconds:.1f} s of CPU time, {most / (1 << 20):.0f} MiB")


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """Downtimes side by side, for guests of each size: an SVG."""
    panels = []
    for guest in _GUESTS:
        mine = [row for row in rows if row["guest"] == guest]
        sizes = list(dict.fromkeys(row["memory"] for row in mine))
        series: dict[str, list[float | None]] = {way: [] for way in _WAYS} | {_HELD: []}
        for row in mine:
            series[row["way"]].append(row["downtime"])
            if row["way"] == "relays":
                series[_HELD].append(row["held"])
        panels.append(BarPanel(f"{guest} guest", "ms", sizes, series))
    return document("Downtime of a live migration, in the lab", panels)


if __name__ == "__main__":
    main()
