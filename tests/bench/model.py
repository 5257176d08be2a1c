"""The results, as they are kept: one object of lists, which JSON can hold."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

SCHEMA = "mtetool.bench/1"

Action = Literal["save", "restore", "verify"]
Way = Literal["cold", "warm"]

ACTIONS: tuple[Action, ...] = ("save", "restore", "verify")
WAYS: tuple[Way, ...] = ("cold", "warm")

MTETOOL = "mtetool"
NO_VERIFY = "mtetool --no-verify"
NUMPY = "mtetool in numpy"
"""As it runs if its inner loops were not compiled."""

ZSTD = "zstd -1 -T2"
ZSTD_MEMORY = "zstd -1 -T2, in memory"
LZ4 = "lz4 -1"
CP = "cp"
TOOLS = (MTETOOL, NO_VERIFY, NUMPY, ZSTD, ZSTD_MEMORY, LZ4, CP)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: wall-clock and CPU time in seconds; peak memory if it had its own process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None = None


@dataclass(slots=True)
class Cell:
    """The runs of one tool doing one thing; its n-th run is compared with the others' n-th."""

    pattern: str
    memory_bytes: int
    action: Action
    way: Way
    tool: str
    runs: list[Run] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median wall-clock time."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def cpu_seconds(self) -> float:
        """The median CPU time."""
        return statistics.median(run.cpu_seconds for run in self.runs)

    @property
    def peak_bytes(self) -> int | None:
        """The median; None for runs in a process that does other things as well."""
        peaks = [run.peak_bytes for run in self.runs if run.peak_bytes is not None]
        return int(statistics.median(peaks)) if peaks else None


def ratio(one: Cell, other: Cell) -> float:
    """How many times as long `one` took as `other`: the median over the rounds."""
    pairs = zip(one.runs, other.runs, strict=True)
    return statistics.median(a.seconds / b.seconds for a, b in pairs)


@dataclass(slots=True)
class Scale:
    """The runs of a save or restore with a number of workers."""

    pattern: str
    memory_bytes: int
    action: Action
    jobs: int
    runs: list[Run] = field(default_factory=list)


@dataclass(slots=True)
class Size:
    """The bytes that a guest's tags take; `of` is the form that was compressed.

    `sampled_bytes` is set if only that many bytes of the tags were compressed, and `n_bytes` was
    projected from them.
    """

    pattern: str
    of: Literal["raw", "packed", "guest"]
    tool: str
    n_bytes: int
    sampled_bytes: int | None = None


@dataclass(slots=True)
class Start:
    """The seconds that each run of a command took that does next to nothing."""

    command: str
    seconds: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Beside:
    """A live guest's tags in the lab: in each run mtetool's seconds, and the bare ioctls'."""

    action: Action
    memory_bytes: int
    runs: list[tuple[float, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """mtetool's median."""
        return statistics.median(took for took, _ in self.runs)

    @property
    def bare_seconds(self) -> float:
        """The median of the ioctls alone."""
        return statistics.median(bare for _, bare in self.runs)

    @property
    def ratio(self) -> float:
        """How many times as long mtetool took: the median over the runs."""
        return statistics.median(took / bare for took, bare in self.runs)


@dataclass(slots=True)
class Results:
    """All results of one run; `machine` has words to print, in order."""

    machine: dict[str, str]
    contended: bool
    cells: list[Cell] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    sizes_memory_bytes: int = 0
    starts: list[Start] = field(default_factory=list)
    lab: list[Beside] = field(default_factory=list)

    def cell(
        self, pattern: str, memory_bytes: int, action: Action, way: Way, tool: str
    ) -> Cell | None:
        """The runs of one kind, if there were any."""
        wanted = (pattern, memory_bytes, action, way, tool)
        for cell in self.cells:
            if (cell.pattern, cell.memory_bytes, cell.action, cell.way, cell.tool) == wanted:
                return cell
        return None

    def size(self, pattern: str, of: str, tool: str) -> Size | None:
        """A size, if it was measured."""
        for size in self.sizes:
            if (size.pattern, size.of, size.tool) == (pattern, of, tool):
                return size
        return None

    def patterns(self) -> list[str]:
        """The patterns that were timed, in that order."""
        return list(dict.fromkeys(cell.pattern for cell in self.cells))

    def memories(self) -> list[int]:
        """The sizes of guests that were timed, ascending."""
        return sorted({cell.memory_bytes for cell in self.cells})

    def write(self, path: Path) -> None:
        """Write the results to a file."""
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that `write` wrote. Raises ValueError for any other file."""
        document = json.loads(path.read_text())
        if document.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} does not hold results of a bench")
        for name in ("cells", "scales"):
            for row in document[name]:
                row["runs"] = [Run(**run) for run in row["runs"]]
        document["cells"] = [Cell(**row) for row in document["cells"]]
        document["scales"] = [Scale(**row) for row in document["scales"]]
        document["sizes"] = [Size(**row) for row in document["sizes"]]
        for row in document["lab"]:
            row["runs"] = [tuple(run) for run in row["runs"]]
        document["lab"] = [Beside(**row) for row in document["lab"]]
        document["starts"] = [Start(**row) for row in document["starts"]]
        return cls(**document)


def median_seconds(runs: Sequence[Run]) -> float:
    """The median of the runs' wall-clock times."""
    return statistics.median(run.seconds for run in runs)
