"""What was counted in tags, as text for people and as JSON: `stats`, and the summary of `dump`."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2
from typing import TYPE_CHECKING, Any

from mtetool.cli.ranges import size
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.cli.screen import Screen
    from mtetool.flows.stats import TagCounts

_BAR_COLUMNS = 40
_N_TAGGED = 15


def counts_json(counts: TagCounts) -> dict[str, Any]:
    """The keys about counts, in the totals and for each slot."""
    lengths = [
        {
            "from_bytes": GRANULE_BYTES << n,
            "below_bytes": GRANULE_BYTES << n + 1,
            "runs": int(n_runs),
            "bytes": int(n_granules) * GRANULE_BYTES,
        }
        for n, (n_runs, n_granules) in enumerate(
            zip(counts.lengths, counts.length_granules, strict=True)
        )
        if n_runs
    ]
    tagged_runs = counts.tagged_runs
    mean = counts.tagged_granules * GRANULE_BYTES / tagged_runs if tagged_runs else None
    return {
        "read_bytes": counts.n_granules * GRANULE_BYTES,
        "unread_bytes": counts.missing_bytes,
        "tagged_bytes": counts.tagged_granules * GRANULE_BYTES,
        "tagged_share": counts.tagged_share,
        "tag_granules": counts.granules.tolist(),
        "tag_runs": counts.runs.tolist(),
        "tagged_runs": tagged_runs,
        "run_lengths": lengths,
        "longest_run_bytes": counts.longest * GRANULE_BYTES,
        "mean_run_bytes": mean,
        "entropy_bits": counts.entropy_bits,
        "run_entropy_bits": counts.run_entropy_bits,
        "collision_share": counts.collision_share,
        "run_collision_share": counts.run_collision_share,
        "same_next_share": counts.same_next_share,
        "skip_one_share": counts.skip_one_share,
    }


def head_lines(counts: TagCounts) -> Iterator[str]:
    """How much memory was read, how much of it is tagged, and in how many runs."""
    yield f"memory   {size(counts.n_granules * GRANULE_BYTES)}"
    if counts.missing_bytes:
        yield f"unread   {size(counts.missing_bytes)}"
    tagged = size(counts.tagged_granules * GRANULE_BYTES)
    yield f"tagged   {tagged}, {_percent(counts.tagged_share)}"
    longest = f"; the longest has {size(counts.longest * GRANULE_BYTES)}" if counts.longest else ""
    yield f"runs     {int(counts.runs.sum()):,}, of which {counts.tagged_runs:,} tagged{longest}"


def tag_lines(counts: TagCounts, screen: Screen) -> Iterator[str]:
    """The histogram of tags; the bars are shares of the tagged granules."""
    granules = counts.granules.tolist()
    yield "tag      granules   share"
    most = max(max(granules[1:]), 1)
    for tag, n in enumerate(granules):
        if tag == 0:
            yield f"{screen.tag(0)}  {n:>15,}"
            continue
        share = _percent(n / counts.tagged_granules if counts.tagged_granules else None)
        bar = _bar(n / most, screen)
        yield f"{screen.tag(tag)}  {n:>15,}  {share:>6}  {bar}".rstrip()


def length_lines(counts: TagCounts, screen: Screen) -> Iterator[str]:
    """How long the tagged runs are."""
    if not counts.tagged_runs:
        return
    yield "bytes          tagged runs   share"
    lengths = counts.lengths.tolist()
    most = max(lengths)
    for n, n_runs in enumerate(lengths):
        if n_runs:
            bytes_here = GRANULE_BYTES << n
            label = f"{_short(bytes_here)}" + (f"-{_short(bytes_here * 2 - 16)}" if n else "")
            share = _percent(n_runs / counts.tagged_runs)
            bar = _bar(n_runs / most, screen)
            yield f"{label:<13} {n_runs:>12,}  {share:>6}  {bar}".rstrip()


def quality_lines(counts: TagCounts) -> Iterator[str]:
    """How well tags tell memory apart, see mtetool-stats(1)."""
    if not counts.tagged_granules:
        return
    best = f"of at most {log2(_N_TAGGED):.3f}"
    yield f"entropy            {counts.entropy_bits:.3f} bits by granule {best},"
    yield f"                   {counts.run_entropy_bits:.3f} bits by run"
    yield f"equal by chance    {_percent(counts.collision_share)} by granule,"
    yield f"                   {_percent(counts.run_collision_share)} by run (ideal: 6.67 %)"
    yield f"equal to the next  {_percent(counts.same_next_share)} of tagged granules"
    yield f"equal to the next but one  {_percent(counts.skip_one_share)} of tagged runs"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f} %"


def _bar(share: float, screen: Screen) -> str:
    room = min(screen.columns - 40, _BAR_COLUMNS)
    return "#" * round(share * room) if room > 0 else ""


def _short(n_bytes: int) -> str:
    """Bytes below a power of two, in few characters."""
    for unit in ("", "K", "M", "G", "T"):
        if n_bytes < 10240 or unit == "T":
            return f"{n_bytes}{unit}"
        n_bytes //= 1024
    raise AssertionError
