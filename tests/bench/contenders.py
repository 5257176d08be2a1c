"""The contenders: for each action mtetool and the other tools that can do it, cold and warm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.model import (
    ACTIONS,
    CP,
    LZ4,
    MTETOOL,
    NO_VERIFY,
    NUMPY,
    ZSTD,
    ZSTD_MEMORY,
    Action,
    Cell,
    Run,
    Way,
)
from tests.bench.running import (
    BenchError,
    Worker,
    has_extension,
    mtetool_command,
    numpy_command,
    program,
    run,
    run_cold,
)

# As many workers as zstd -T2 has.
JOBS = 2

# Larger guests take long, and show nothing new.
_NUMPY_MAX_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Material:
    """The files of one guest, all in `directory`; a restore takes the results of a save."""

    directory: Path
    pattern: str
    memory_bytes: int

    def path(self, name: str) -> str:
        """The path of a file, by its name."""
        return str(self.directory / name)

    @property
    def guest(self) -> str:
        """The guest that is saved."""
        return "emu:" + self.path("guest")

    @property
    def fresh(self) -> str:
        """The guest that is restored: without any tag, before every run."""
        return "emu:" + self.path("fresh")

    @property
    def n_bytes(self) -> int:
        """The size of its tags, one byte for 16 bytes of memory."""
        return self.memory_bytes // 16

    def make(self, seed: int) -> None:
        """Make the guest, one without tags, and the bare tags."""
        memory = ("--memory", str(self.memory_bytes))
        words = [*mtetool_command(), "emu", "create"]
        fill = ("--fill", self.pattern, "--seed", str(seed))
        run([*words, self.path("guest"), *memory, *fill])
        run([*words, self.path("empty"), *memory])
        dump = [*mtetool_command(), "dump", self.guest, "--output", "raw"]
        run(dump, out=self.directory / "raw")

    def empty_guest(self) -> None:
        """Reset the guest that is restored to no tags at all."""
        (self.directory / "fresh").unlink(missing_ok=True)
        # Holes stay holes.
        run(["cp", "--sparse=always", self.path("empty"), self.path("fresh")])


@dataclass(frozen=True, slots=True)
class Contender:
    """One tool doing one thing: its process, its operation of the warm worker, its result.

    `check` is a command that exits with status 0 if the result is right.
    """

    tool: str
    cold: tuple[str, ...] | None
    warm: tuple[str, ...] | None
    output: str | None = None
    prepare: Callable[[], None] | None = None
    check: tuple[str, ...] | None = None


def contenders(material: Material, action: Action) -> tuple[Contender, ...]:
    """All tools that can do `action` on this guest."""
    return {"save": _save, "restore": _restore, "verify": _verify}[action](material)


def _save(material: Material) -> tuple[Contender, ...]:
    at = material.path
    ours = ("save", material.guest, "-o", at("snapshot"), "--quiet", "--jobs", str(JOBS))
    zstd = (program("zstd"), "-1", "-T2", "-q", "-f", at("raw"), "-o", at("zst"))
    lz4 = (program("lz4"), "-1", "-q", "-f", at("raw"), at("lz4"))
    return (
        *_ours(material, ours, "snapshot"),
        Contender(ZSTD, zstd, ("zstd save", at("raw"), at("zst")), "zst"),
        Contender(ZSTD_MEMORY, None, ("zstd save in memory", at("raw"), "")),
        Contender(LZ4, lz4, ("lz4 save", at("raw"), at("lz4")), "lz4"),
        Contender(CP, ("cp", at("raw"), at("copy")), ("cp", at("raw"), at("copy")), "copy"),
    )


def _restore(material: Material) -> tuple[Contender, ...]:
    at = material.path
    words = ("restore", at("snapshot"), material.fresh, "--quiet")
    zstd = (program("zstd"), "-d", "-q", "-f", at("zst"), "-o", at("zst.out"))
    lz4 = (program("lz4"), "-d", "-q", "-f", at("lz4"), at("lz4.out"))
    cp = ("cp", at("copy"), at("cp.out"))
    zstd_warm = ("zstd restore", at("zst"), at("zst.out"))
    lz4_warm = ("lz4 restore", at("lz4"), at("lz4.out"), str(material.n_bytes))
    fast = (*words, "--no-verify")
    same = (*mtetool_command(), "diff", material.guest, material.fresh)
    prepare = material.empty_guest
    return (
        *_ours(material, words, None, prepare, same),
        Contender(NO_VERIFY, (*mtetool_command(), *fast), ("mtetool", *fast), None, prepare, same),
        Contender(ZSTD, zstd, zstd_warm, "zst.out", None, _cmp(material, "zst.out")),
        Contender(LZ4, lz4, lz4_warm, "lz4.out", None, _cmp(material, "lz4.out")),
        Contender(CP, cp, cp, "cp.out", None, _cmp(material, "cp.out")),
    )


def _verify(material: Material) -> tuple[Contender, ...]:
    at = material.path
    cmp = ("cmp", at("raw"), at("copy"))
    lz4 = (program("lz4"), "-t", "-q", at("lz4"))
    zstd = (program("zstd"), "-t", "-T2", "-q", at("zst"))
    return (
        *_ours(material, ("verify", at("snapshot"), "--quiet"), None),
        Contender(ZSTD, zstd, ("zstd verify", at("zst"), "")),
        Contender(LZ4, lz4, ("lz4 verify", at("lz4"), str(material.n_bytes))),
        Contender(CP, cmp, cmp),
    )


def _cmp(material: Material, name: str) -> tuple[str, ...]:
    return ("cmp", material.path("raw"), material.path(name))


def _ours(
    material: Material,
    words: tuple[str, ...],
    output: str | None,
    prepare: Callable[[], None] | None = None,
    check: tuple[str, ...] | None = None,
) -> Iterator[Contender]:
    warm = ("mtetool", *words)
    yield Contender(MTETOOL, (*mtetool_command(), *words), warm, output, prepare, check)
    if has_extension() and material.memory_bytes <= _NUMPY_MAX_BYTES:
        yield Contender(NUMPY, (*numpy_command(), *words), warm, output, prepare, check)


@dataclass(slots=True)
class Race:
    """Runs of all contenders in turn; `ours` is the warm process of mtetool, and so on."""

    scratch: Path
    ours: Worker
    numpy: Worker
    others: Worker

    def rounds(self, material: Material, n_rounds: int) -> Iterator[Cell]:
        """Save, restore, verify: in each round every contender runs once cold and once warm.

        Each round starts with another contender. The results of restores are compared with the
        guest, once. Raises BenchError.
        """
        for action in ACTIONS:
            everyone = contenders(material, action)
            entries: list[tuple[Contender, Way]] = [(c, "cold") for c in everyone if c.cold]
            entries += [(c, "warm") for c in everyone if c.warm]
            cells = {
                (c.tool, way): Cell(material.pattern, material.memory_bytes, action, way, c.tool)
                for c, way in entries
            }
            # The first round loads, faults in and fills the page cache; it does not count.
            for number in range(n_rounds + 1):
                first = number % len(entries)
                for contender, way in entries[first:] + entries[:first]:
                    done = self.once(material, contender, way)
                    if number:
                        cells[contender.tool, way].runs.append(done)
                    elif contender.check is not None:
                        run(contender.check)
            yield from cells.values()

    def once(self, material: Material, contender: Contender, way: Way) -> Run:
        """Run once, with no earlier output in place. Raises BenchError."""
        if contender.output is not None:
            (material.directory / contender.output).unlink(missing_ok=True)
        if contender.prepare is not None:
            contender.prepare()
        if way == "cold":
            if contender.cold is None:
                raise BenchError(f"{contender.tool} has no command to run as a process")
            return run_cold(contender.cold, self.scratch)
        if contender.warm is None:
            raise BenchError(f"{contender.tool} has no worker")
        operation, *words = contender.warm
        worker = self.ours if operation == "mtetool" else self.others
        if contender.tool == NUMPY:
            worker = self.numpy
        return worker.run(operation, *words)
