"""Measurements besides the race: sizes of files, the start, and scaling."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import click

from mtetool import loops
from mtetool.cli import group
from tests.bench.contenders import Material
from tests.bench.model import MTETOOL, Action, Scale, Size, Start
from tests.bench.running import ROOT, BenchError, mtetool_command, program, run, run_cold

COMPRESSORS: dict[str, tuple[str, ...]] = {
    "zstd -1": ("zstd", "-1", "-T2", "-q", "-c"),
    "zstd -19": ("zstd", "-19", "-T2", "-q", "-c"),
    "xz -6": ("xz", "-6", "-T2", "-q", "-c"),
}

# These take minutes for 64 MiB without any pattern, and a part of it shows as much.
_SLOW = ("zstd -19", "xz -6")
_SAMPLE_BYTES = 4 << 20
_STEP = 1 << 20


def sizes(material: Material) -> Iterator[Size]:
    """The sizes of a guest's tags as a snapshot, and raw and packed by other compressors."""
    snapshot = material.directory / "snapshot"
    snapshot.unlink(missing_ok=True)
    run([*mtetool_command(), "save", material.guest, "-o", str(snapshot), "--quiet"])
    yield Size(material.pattern, "guest", MTETOOL, snapshot.stat().st_size)
    raw = Path(material.path("raw"))
    packed = material.directory / "packed"
    _pack(raw, packed)
    yield Size(material.pattern, "packed", "", packed.stat().st_size)
    forms: tuple[tuple[Literal["raw", "packed"], Path], ...] = (("raw", raw), ("packed", packed))
    for of, path in forms:
        for tool in COMPRESSORS:
            yield _compressed(material, of, path, tool)


def _pack(raw: Path, packed: Path) -> None:
    room = memoryview(bytearray(_STEP // 2))
    with raw.open("rb") as tags, packed.open("wb") as out:
        while part := tags.read(_STEP):
            loops.pack(memoryview(part), room[: len(part) // 2])
            out.write(room[: len(part) // 2])


def _compressed(material: Material, of: Literal["raw", "packed"], path: Path, tool: str) -> Size:
    name, *words = COMPRESSORS[tool]
    out = material.directory / "compressed"
    whole = path.stat().st_size
    sample = None
    if material.pattern == "random" and tool in _SLOW and whole > _SAMPLE_BYTES:
        sample, source = _SAMPLE_BYTES, material.directory / "sample"
        with path.open("rb") as file:
            source.write_bytes(file.read(sample))
        path = source
    run([program(name), *words, str(path)], out=out)
    n_bytes = out.stat().st_size
    return Size(material.pattern, of, tool, n_bytes * whole // (sample or whole), sample)


def starts(material: Material, n_rounds: int) -> list[Start]:
    """Time bare Python, `--help` and `info`, in turn, in one interpreter with the same options.

    Raises BenchError if one fails.
    """
    snapshot = material.path("snapshot")
    small = (material.guest, "--range", "0x40000000:1M", "-o", "/dev/null", "--quiet")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -I -c pass": [sys.executable, "-I", "-c", "pass"],
        "mtetool --help": [*mtetool_command(), "--help"],
        "mtetool info FILE": [*mtetool_command(), "info", snapshot],
        "mtetool save (1 MiB of guest)": [*mtetool_command(), "save", *small],
    }
    results = [Start(name) for name in commands]
    for number in range(n_rounds + 1):
        for result in results:
            start = time.perf_counter()
            done = subprocess.run(
                commands[result.command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise BenchError(f"{result.command}: {done.stderr.decode(errors='replace')}")
            if number:
                result.seconds.append(seconds)
    return results


def _has_jobs(command: str) -> bool:
    found = group.get_command(click.Context(group), command)
    return found is not None and any("--jobs" in option.opts for option in found.params)


def scaling(material: Material, jobs: Sequence[int], n_rounds: int) -> Iterable[Scale]:
    """Time save and restore as processes, with each number of workers if they have --jobs."""
    actions: dict[Action, list[str]] = {
        "save": ["save", material.guest, "-o", material.path("snapshot"), "--quiet"],
        "restore": ["restore", material.path("snapshot"), material.fresh, "--quiet"],
    }
    found: list[Scale] = []
    for action, words in actions.items():
        can = _has_jobs(action)
        choices = jobs if can else jobs[:1]
        scales = [Scale(material.pattern, material.memory_bytes, action, n) for n in choices]
        for number in range(n_rounds + 1):
            for scale in scales:
                if action == "save":
                    Path(material.path("snapshot")).unlink(missing_ok=True)
                else:
                    material.empty_guest()
                option = ["--jobs", str(scale.jobs)] if can else []
                done = run_cold([*mtetool_command(), *words, *option], material.directory)
                if number:
                    scale.runs.append(done)
        found += scales
    return found
