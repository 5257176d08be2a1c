"""The report of a run: tables in Markdown, and the charts that go with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.charts import BarPanel, LinePanel, document
from tests.bench.model import (
    ACTIONS,
    CP,
    LZ4,
    MTETOOL,
    NO_VERIFY,
    NUMPY,
    TOOLS,
    WAYS,
    ZSTD,
    Action,
    Cell,
    Results,
    Scale,
    median_seconds,
    ratio,
)
from tests.bench.others import COMPRESSORS
from tests.bench.targets import gib, targets

_MIB = 1 << 20


def write(results: Results, directory: Path) -> str:
    """Write results.md and the charts (*.svg); return the text of results.md."""
    text = "\n".join(_text(results))
    (directory / "results.md").write_text(text)
    if results.cells:
        for action in ("save", "restore"):
            (directory / f"{action}.svg").write_text(_race_chart(results, action))
    if results.scales:
        (directory / "scaling.svg").write_text(_scaling_chart(results))
    if results.lab:
        (directory / "lab.svg").write_text(_lab_chart(results))
    return text


# --- text -----------------------------------------------------------------------------------


def _text(results: Results) -> Iterator[str]:
    yield "# What mtetool costs, measured\n"
    if results.contended:
        yield "**Not a result: the machine was busy with other work.**\n"
    for name, words in results.machine.items():
        yield f"- {name}: {words}"
    yield ""
    yield (
        "All guests are emulated: their tags are in a file. *Cold* is a whole process, *warm* the"
        " same work in a process that has done it before. Times are medians of rounds in which"
        " every tool ran in turn; ratios are medians of each round's ratio. The other tools"
        " compress, copy and compare the bare tags, one byte per tag."
    )
    yield "\n## Demanded and measured\n"
    rows = [
        (row.what, row.demanded, row.measured, {True: "yes", False: "**no**", None: ""}[row.met])
        for row in targets(results)
    ]
    yield from table(("", "demanded", "measured", "met"), rows)
    yield "\nRandom tags cannot be compressed: two in a byte (packed) is as small as they get."
    yield from _lab(results)
    for memory in results.memories():
        yield f"\n## A guest of {gib(memory)}, {memory // 16 // _MIB} MiB of raw tags\n"
        yield from _speed(results, memory)
        yield "\nCPU time and peak memory of the whole processes:\n"
        yield from _burden(results, memory)
    yield from _sizes(results)
    yield from _starts(results)
    yield from _scaling(results)
    yield ""


def _lab(results: Results) -> Iterator[str]:
    if not results.lab:
        return
    yield "\n## A live QEMU guest in the lab, beside a program that does nothing but the ioctls\n"
    rows = []
    for beside in results.lab:
        ratios = sorted(took / bare for took, bare in beside.runs)
        rows.append(
            (
                f"{beside.action}, {gib(beside.memory_bytes)}",
                _time(beside.seconds),
                _time(beside.bare_seconds),
                f"{beside.ratio:.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            )
        )
    head = ("", MTETOOL, "the bare ioctls", "median of the ratios", f"all {len(ratios)}")
    yield from table(head, rows)
    yield (
        "\n(From the first ioctl to the end of the last. A restore reads all tags back and compares"
        " them. The host is emulated: its times mean nothing for hardware, their ratios may.)"
    )


def _speed(results: Results, memory: int) -> Iterator[str]:
    rows = []
    for pattern in results.patterns():
        for action in ACTIONS:
            for way in WAYS:
                cells = [results.cell(pattern, memory, action, way, tool) for tool in TOOLS]
                ours = cells[0]
                if ours is None:
                    continue
                speed = memory / ours.seconds / (1 << 30)
                beside = [_beside(cell, ours) for cell in cells[1:]]
                rows.append(
                    (pattern, action, way, _time(ours.seconds), f"{speed:.1f} GiB/s", *beside)
                )
    head = ("guest", "", "", MTETOOL, "of guest", "--no-verify", "numpy", ZSTD, "memory", LZ4, "cp")
    yield from table(head, rows)
    yield (
        "\n(In brackets: the time as a multiple of mtetool's. --no-verify: a restore that reads"
        " nothing back; numpy: mtetool without its C extension; memory: from buffer to buffer,"
        " without files; cp: cmp for verify.)"
    )


def _beside(cell: Cell | None, ours: Cell) -> str:
    return "" if cell is None else f"{_time(cell.seconds)} ({ratio(cell, ours):.2f})"


def _burden(results: Results, memory: int) -> Iterator[str]:
    tools = (MTETOOL, NO_VERIFY, NUMPY, ZSTD, LZ4, CP)
    rows = []
    for pattern in results.patterns():
        for action in ACTIONS:
            cells = [results.cell(pattern, memory, action, "cold", tool) for tool in tools]
            rows.append((pattern, action, *(_cpu_and_peak(cell) for cell in cells)))
    yield from table(("guest", "", MTETOOL, "--no-verify", "numpy", ZSTD, LZ4, "cp, cmp"), rows)


def _cpu_and_peak(cell: Cell | None) -> str:
    if cell is None or cell.peak_bytes is None:
        return ""
    return f"{_time(cell.cpu_seconds)}, {cell.peak_bytes / _MIB:.0f} MiB"


def _sizes(results: Results) -> Iterator[str]:
    if not results.sizes:
        return
    n_tags = results.sizes_memory_bytes // 16
    yield f"\n## The file of a guest of {gib(results.sizes_memory_bytes)}\n"
    names = [f"{tool}, {of}" for of in ("raw", "packed") for tool in COMPRESSORS]
    rows = []
    for pattern in dict.fromkeys(size.pattern for size in results.sizes):
        ours = results.size(pattern, "guest", MTETOOL)
        if ours is None:
            continue
        row = [pattern, f"{ours.n_bytes:,} ({100 * ours.n_bytes / n_tags:.2f}%)"]
        for of in ("raw", "packed"):
            for tool in COMPRESSORS:
                size = results.size(pattern, of, tool)
                projected = "≈ " if size is not None and size.sampled_bytes else ""
                row.append(
                    f"{projected}{size.n_bytes:,} ({ours.n_bytes / size.n_bytes:.2f})"
                    if size
                    else ""
                )
        rows.append(tuple(row))
    yield from table(("guest", "mtetool, of the raw tags", *names), rows)
    sampled = {size.sampled_bytes for size in results.sizes if size.sampled_bytes}
    yield "\n(Bytes. In brackets: the size of mtetool's file as a multiple of that file's."
    for n_bytes in sampled:
        yield f"≈: projected from the first {n_bytes // _MIB} MiB."
    yield "Packed: two tags in a byte.)"


def _starts(results: Results) -> Iterator[str]:
    if not results.starts:
        return
    yield "\n## The start\n"
    bare = statistics.median(results.starts[0].seconds)
    rows = []
    for start in results.starts:
        median = statistics.median(start.seconds)
        rows.append((f"`{start.command}`", _time(median), f"{1000 * (median - bare):+.0f} ms"))
    yield from table(("command", "median", f"beside `{results.starts[0].command}`"), rows)
    yield (
        f"\n({len(results.starts[0].seconds)} runs of each, in turn, in one interpreter, with only"
        " the options shown.)"
    )


def _scaling(results: Results) -> Iterator[str]:
    if not results.scales:
        return
    yield f"\n## Scaling: {results.scales[0].pattern}, whole processes\n"
    rows = [
        (
            scale.action,
            gib(scale.memory_bytes),
            str(scale.jobs),
            _time(median_seconds(scale.runs)),
            _time(statistics.median(run.cpu_seconds for run in scale.runs)),
            f"{_peak(scale) / _MIB:.0f} MiB",
        )
        for scale in sorted(results.scales, key=lambda s: (s.action, s.memory_bytes, s.jobs))
    ]
    yield from table(("", "guest", "`--jobs`", "time", "CPU", "peak memory"), rows)


def _peak(scale: Scale) -> float:
    return statistics.median(run.peak_bytes or 0 for run in scale.runs)


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table whose columns are aligned in plain text, too."""
    widths = [
        max([len(head[column]), 3, *(len(row[column]) for row in rows)])
        for column in range(len(head))
    ]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(cells)} |"


# --- charts ---------------------------------------------------------------------------------


def _race_chart(results: Results, action: Action) -> str:
    memory = results.memories()[-1]
    if 4 << 30 in results.memories():
        memory = 4 << 30
    tools = (MTETOOL, NO_VERIFY, ZSTD, LZ4, CP)
    panels = []
    for way in WAYS:
        series = {}
        for tool in tools:
            cells = [results.cell(name, memory, action, way, tool) for name in results.patterns()]
            if any(cells):
                series[tool] = [1000 * cell.seconds if cell else None for cell in cells]
        title = {"cold": "whole processes", "warm": "in a process that stays"}[way]
        panels.append(BarPanel(title, "milliseconds", results.patterns(), series))
    return document(f"Time to {action} the tags of a guest of {gib(memory)}", panels)


def _lab_chart(results: Results) -> str:
    actions = [beside.action for beside in results.lab]
    series: dict[str, list[float | None]] = {
        MTETOOL: [beside.seconds for beside in results.lab],
        "the bare ioctls": [beside.bare_seconds for beside in results.lab],
    }
    panel = BarPanel("first ioctl to last", "seconds", actions, series)
    memory = gib(results.lab[0].memory_bytes)
    return document(f"The tags of a live QEMU guest of {memory}, in the lab", [panel])


def _scaling_chart(results: Results) -> str:
    panels = []
    for action in ("save", "restore"):
        scales = [scale for scale in results.scales if scale.action == action]
        times: dict[str, list[tuple[float, float]]] = {}
        peaks: dict[str, list[tuple[float, float]]] = {}
        for scale in sorted(scales, key=lambda s: (s.jobs, s.memory_bytes)):
            at = scale.memory_bytes / (1 << 30)
            name = f"--jobs {scale.jobs}" if len({s.jobs for s in scales}) > 1 else action
            times.setdefault(name, []).append((at, median_seconds(scale.runs)))
            peaks.setdefault(name, []).append((at, _peak(scale) / _MIB))
        panels.append(LinePanel(f"{action}: time", "GiB of guest", "seconds", times))
        panels.append(LinePanel(f"{action}: peak memory", "GiB of guest", "MiB", peaks))
    pattern = results.scales[0].pattern if results.scales else ""
    return document(f"Time and memory against size and workers ({pattern} guest)", panels)
