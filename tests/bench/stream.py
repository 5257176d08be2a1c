"""`python -m tests.bench.stream [RUNS [MIB]]`: a stream through both relays, and through socats.

This is not a migration in the lab: programs that write and read a stream stand in for QEMU, and the
guests are emulated ones without tags. So it measures the way of the bytes alone, on the processor
of this machine; `tests.bench.relay` has what a real migration costs. The time is from the first
page to the last; that of the end, in which the guest stands still, from the end of RAM until the
destination's answer is back at the source.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.bench.running import mtetool_command, program
from tests.relay import streams
from tests.relay.migrating import CONFIRMED, TAIL, beginning, pages

_GUEST_MIB = 64
_PART_PAGES = 256
_READ_BYTES = 1 << 20
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Passed:
    """What one stream took, and the CPU seconds of the process at the source and of the other."""

    seconds: float
    end_seconds: float
    cpu: tuple[float, float]


def main() -> None:
    """Measure both ways by turns, and print the medians."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    parts = _parts(int(sys.argv[2]) if len(sys.argv) > 2 else 1024)
    size = sum(map(len, parts))
    found: dict[str, list[Passed]] = {"socat": [], "relays": []}
    for _ in range(runs):
        for way, rows in found.items():
            rows.append(_pass(way, parts))
    print(f"{size >> 20} MiB of stream, median of {runs}")
    for way, rows in found.items():
        seconds = statistics.median(row.seconds for row in rows)
        cpu = [statistics.median(row.cpu[end] for row in rows) for end in range(2)]
        end = statistics.median(row.end_seconds for row in rows)
        every = " ".join(f"{row.seconds:.2f}" for row in rows)
        print(
            f"{way:8} {size / seconds / 1e6:6.0f} MB/s, the end {end * 1e3:.1f} ms,"
            f" CPU {cpu[0]:.2f} and {cpu[1]:.2f} s; all runs {every} s"
        )
    ratios = [a.seconds / b.seconds for a, b in zip(found["socat"], found["relays"], strict=True)]
    print(f"relays' rate / socat's: {statistics.median(ratios):.2f}")


def _parts(mib: int) -> list[bytes]:
    """Sections with pages in full, all of the guest's by turns."""
    made = [
        streams.part(pages(range(first, first + _PART_PAGES), streams.FULL))
        for first in range(0, _GUEST_MIB << 8, _PART_PAGES)
    ]
    return [made[number % len(made)] for number in range(mib)]


def _pass(way: str, parts: Sequence[bytes]) -> Passed:
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as incoming:
        directory = Path(name)
        incoming.bind(str(directory / "into"))
        incoming.listen(1)
        incoming.settimeout(_PATIENCE_SECONDS)
        commands = _COMMANDS[way](directory)
        processes = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for words in commands]
        try:
            writer = _connect(directory / "out")
            reader, _ = incoming.accept()
            with writer, reader:
                seconds = _stream(writer, reader, parts)
                end_seconds = _end(writer, reader)
            used = [os.wait4(process.pid, 0)[2] for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        cpu = [usage.ru_utime + usage.ru_stime for usage in used]
        return Passed(seconds, end_seconds, (cpu[0], cpu[1]))


def _stream(writer: socket.socket, reader: socket.socket, parts: Sequence[bytes]) -> float:
    """Let the stream pass, but for the end of RAM; return the seconds of its pages."""
    first = beginning(n_pages=_GUEST_MIB << 8)
    with ThreadPoolExecutor(1) as pool:
        writer.sendall(first)
        _read(reader, len(first))
        started = time.perf_counter()
        reading = pool.submit(_read, reader, sum(map(len, parts)))
        for part in parts:
            writer.sendall(part)
        reading.result()
        return time.perf_counter() - started


def _read(reader: socket.socket, n: int) -> None:
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    while n:
        got = reader.recv_into(view[: min(n, _READ_BYTES)])
        if not got:
            raise EOFError("the stream ended too early")
        n -= got


def _end(writer: socket.socket, reader: socket.socket) -> float:
    """End the stream, and answer as QEMU does; return the seconds until the answer has come."""
    last = streams.end() + TAIL
    with ThreadPoolExecutor(1) as pool:
        running = threading.Event()
        answering = pool.submit(_answer, reader, len(last), running)
        running.wait()
        started = time.perf_counter()
        writer.sendall(last)
        _read(writer, len(CONFIRMED))
        seconds = time.perf_counter() - started
        answering.result()
        return seconds


def _answer(reader: socket.socket, n: int, running: threading.Event) -> None:
    running.set()
    _read(reader, n)
    reader.sendall(CONFIRMED)


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            made.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return made


def _relays(directory: Path) -> list[list[str]]:
    """The commands at the source and at the destination."""
    mtetool = list(mtetool_command())
    found = []
    for role, here, there in (
        ("source", f"listen:unix:{directory}/out", f"unix:{directory}/between"),
        ("destination", f"listen:unix:{directory}/between", f"unix:{directory}/into"),
    ):
        guest = directory / role
        create = ["emu", "create", str(guest), "--memory", f"{_GUEST_MIB}M", "--quiet"]
        subprocess.run([*mtetool, *create], check=True, stdout=subprocess.DEVNULL)
        words = ["relay", role, "--from", here, "--to", there, "--guest", f"emu:{guest}"]
        found.append([*mtetool, *words, "--quiet", "--progress", "none", "--json"])
    return found


def _socats(directory: Path) -> list[list[str]]:
    socat = program("socat")
    unix = {name: f"UNIX-CONNECT:{directory}/{name},retry=1000,interval=0.01" for name in _ENDS}
    listening = {name: f"UNIX-LISTEN:{directory}/{name}" for name in _ENDS}
    return [
        [socat, listening["out"], unix["between"]],
        [socat, listening["between"], unix["into"]],
    ]


_ENDS = ("out", "between", "into")
_COMMANDS = {"socat": _socats, "relays": _relays}

if __name__ == "__main__":
    main()
