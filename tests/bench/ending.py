"""`python -m tests.bench.ending [RUNS]`: how long a migration's end waits for the last tags.

Both relays run here, with emulated guests whose copies take as long as in the lab: a chain of calls
20 or 30 ms, and each page some more. A scripted QEMU sends the same 1,024 pages again and again,
stops, sends the last of them, and takes a while for its devices. The times are mostly pauses, so
they are the same on any machine; compare the wait with what one chain for all of these pages takes.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from mtetool.relay.report import Report
from tests.relay import streams
from tests.relay.migrating import BASE, TAIL, Scene, beginning, pages, scene

_N_PAGES, _N_HOT = 4096, 1024
_STREAM_BYTES_PER_SECOND = 20e6
_DEVICES_SECONDS = 0.15
# Seconds of a chain, and of a page in it: to read, and to write and read back.
_READ, _WRITE = (0.02, 0.00014), (0.03, 0.0003)
_PIECE_PAGES = 64
_KEPT_BYTES = 20_000  # QEMU keeps the last bytes of RAM until it has saved its devices


def _slow(copy: Callable[..., int], cost: tuple[float, float]) -> Callable[..., int]:
    def slowly(guest: object, extents: Any, tags: Any) -> int:
        time.sleep(cost[0] + cost[1] * len(tags) / 256)
        return copy(guest, extents, tags)

    return slowly


async def _send(made: Scene, data: bytes) -> None:
    """Send as fast as QEMU does there."""
    step = 4096 * _PIECE_PAGES
    for at in range(0, len(data), step):
        await made.write(data[at : at + step])
        await asyncio.sleep(min(step, len(data) - at) / _STREAM_BYTES_PER_SECOND)


async def _swallow(made: Scene) -> None:
    while await made.arrived():
        pass


async def _migrate(made: Scene, hot: list[int], last: list[int], seconds: float) -> Report:
    swallowing = asyncio.create_task(_swallow(made))
    await made.write(beginning(n_pages=_N_PAGES) + streams.part(pages(range(_N_PAGES))))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for at in range(0, _N_HOT, _PIECE_PAGES):
            if time.monotonic() < deadline:
                some = hot[at : at + _PIECE_PAGES]
                await _send(made, streams.part(pages(some, streams.FULL)))
    end = streams.command(11) + streams.end(pages(last, streams.FULL))
    await _send(made, end[:-_KEPT_BYTES])
    await asyncio.sleep(_DEVICES_SECONDS)
    await made.write(end[-_KEPT_BYTES:] + TAIL)
    while not any("may start" in text for text in made.destination.said):
        await asyncio.sleep(0.002)
    await made.confirm()
    report = await made.source.report()
    swallowing.cancel()
    return report


async def _run(seed: int, n_last: int) -> Report:
    chance = np.random.default_rng(seed)
    hot = np.sort(chance.choice(_N_PAGES, _N_HOT, replace=False)).tolist()
    last = np.sort(chance.choice(hot, n_last, replace=False)).tolist()
    tags = np.zeros((_N_PAGES, 256), np.uint8)
    tags[hot] = chance.integers(1, 16, (_N_HOT, 256))
    with tempfile.TemporaryDirectory() as directory:
        async with scene(Path(directory), n_pages=_N_PAGES) as made:
            made.source.guest.write_tags(BASE, tags.ravel())
            kind = type(made.source.guest)
            with (
                patch.object(kind, "read_scattered", _slow(kind.read_scattered, _READ)),
                patch.object(kind, "write_scattered", _slow(kind.write_scattered, _WRITE)),
            ):
                return await _migrate(made, hot, last, 2 + chance.random())


def main() -> None:
    """Measure, and print a row for few and for many last pages."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    together = _READ[0] + _WRITE[0] + _N_HOT * (_READ[1] + _WRITE[1])
    print(f"one chain for {_N_HOT:,} pages: {together * 1000:.0f} ms")
    for n_last in (200, 1000):
        held = [asyncio.run(_run(seed, n_last)).held_seconds or 0.0 for seed in range(runs)]
        middle = statistics.median(held)
        print(
            f"{n_last:5} last pages: held {middle * 1000:.0f} ms"
            f" ({min(held) * 1000:.0f} to {max(held) * 1000:.0f}), {middle / together:.2f} of that"
        )


if __name__ == "__main__":
    main()
