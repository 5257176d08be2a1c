"""The demands on mtetool, compared with the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.model import MTETOOL, ZSTD, ZSTD_MEMORY, Results, ratio

_GIB = 1 << 30
_TIMED = ("heap", "kernel")
_TAGGED = ("sparse", "heap", "kernel")
_WARM_FACTOR = 2.5
_COLD_FROM_BYTES = 4 * _GIB
_FILE_FACTOR = 0.75
_START_SECONDS = 0.060
_LOOP_FACTOR = 1.1


@dataclass(frozen=True, slots=True)
class Target:
    """A row; `met` is None if no figure is demanded."""

    what: str
    demanded: str
    measured: str
    met: bool | None


def targets(results: Results) -> Iterator[Target]:
    """All rows that something was measured for."""
    yield from _beside_the_loop(results)
    yield from _warm(results)
    yield from _cold(results)
    yield from _files(results)
    yield from _starts(results)


def _beside_the_loop(results: Results) -> Iterator[Target]:
    loops = {"save": "the bare ioctl loop", "restore": "the two loops it needs"}
    for beside in results.lab:
        yield Target(
            f"{beside.action} of a live guest, {gib(beside.memory_bytes)}, in the lab",
            f"at most {_LOOP_FACTOR} times {loops[beside.action]}",
            f"{beside.ratio:.2f} times",
            beside.ratio <= _LOOP_FACTOR,
        )


def _warm(results: Results) -> Iterator[Target]:
    for memory in results.memories():
        for pattern in _TIMED:
            ours = results.cell(pattern, memory, "save", "warm", MTETOOL)
            others = [
                cell
                for tool in (ZSTD, ZSTD_MEMORY)
                if (cell := results.cell(pattern, memory, "save", "warm", tool))
            ]
            if ours is None or not others:
                continue
            # mtetool must outrun the faster of the two.
            factor = min(ratio(other, ours) for other in others)
            yield Target(
                f"save, warm, {pattern}, {gib(memory)}",
                f"at least {_WARM_FACTOR} times as fast as {ZSTD}",
                f"{factor:.2f} times",
                factor >= _WARM_FACTOR,
            )


def _cold(results: Results) -> Iterator[Target]:
    for memory in results.memories():
        if memory < _COLD_FROM_BYTES:
            continue
        for pattern in _TIMED:
            ours = results.cell(pattern, memory, "save", "cold", MTETOOL)
            other = results.cell(pattern, memory, "save", "cold", ZSTD)
            if ours is None or other is None:
                continue
            factor = ratio(other, ours)
            yield Target(
                f"save, cold, {pattern}, {gib(memory)}",
                f"not slower than {ZSTD}",
                f"{factor:.2f} times as fast",
                factor >= 1,
            )


def _files(results: Results) -> Iterator[Target]:
    at = gib(results.sizes_memory_bytes)
    for pattern in _TAGGED:
        ours = results.size(pattern, "guest", MTETOOL)
        zstd = results.size(pattern, "raw", "zstd -1")
        xz = results.size(pattern, "raw", "xz -6")
        if ours is None or zstd is None or xz is None:
            continue
        factor = ours.n_bytes / zstd.n_bytes
        yield Target(
            f"file, {pattern}, {at}",
            f"at most {_FILE_FACTOR} times that of zstd -1 of the raw tags",
            f"{factor:.2f} times",
            factor <= _FILE_FACTOR,
        )
        yield Target(
            f"file, {pattern}, {at}",
            "near xz -6 of the raw tags",
            f"{ours.n_bytes / xz.n_bytes:.2f} times",
            None,
        )


def _starts(results: Results) -> Iterator[Target]:
    medians = {start.command: statistics.median(start.seconds) for start in results.starts}
    bare = medians.get("python -c pass")
    for command, median in medians.items():
        if bare is None or command not in ("mtetool --help", "mtetool info FILE"):
            continue
        more = median - bare
        yield Target(
            f"`{command}`",
            f"at most {1000 * _START_SECONDS:.0f} ms more than `python -c pass`",
            f"{1000 * more:.0f} ms more",
            more <= _START_SECONDS,
        )


def gib(n_bytes: int) -> str:
    """A size of memory, in words."""
    if n_bytes % _GIB:
        return f"{n_bytes / (1 << 20):.0f} MiB"
    return f"{n_bytes // _GIB} GiB"
