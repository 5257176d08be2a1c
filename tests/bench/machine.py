"""A description of the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import numpy
import zstandard

from mtetool import __version__
from tests.bench.running import has_extension, mtetool_command


def describe(scratch: Path) -> dict[str, str]:
    """Describe the machine, its software, and where the files are."""
    memory = _meminfo("MemTotal")
    commit = _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    version = ".".join(map(str, zstandard.ZSTD_VERSION))
    return {
        "processor": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {memory >> 30} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "mtetool": f"{__version__} ({commit}), loops in {'C' if has_extension() else 'numpy'},"
        f" started as {_start()}",
        "Python": f"{platform.python_version()}, numpy {numpy.__version__},"
        f" zstandard {zstandard.__version__} (libzstd {version})",
        "beside it": ", ".join((_version("zstd"), _version("lz4"), _version("xz"))),
        "files": "in memory (tmpfs), input and output"
        if is_in_memory(scratch)
        else f"on {_file_system(scratch)}, with the input in the page cache",
    }


def is_in_memory(path: Path) -> bool:
    """Whether files there are in memory only."""
    return _file_system(path) in ("tmpfs", "ramfs")


def available_bytes() -> int:
    """The memory available without swapping."""
    return _meminfo("MemAvailable")


def _start() -> str:
    command = mtetool_command()
    return "its script" if len(command) == 1 else "python -c, as its script does"


def _meminfo(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else "an unnamed processor"


def _file_system(path: Path) -> str:
    return _first_line("stat", "-f", "-c", "%T", str(path))


def _version(name: str) -> str:
    match = re.search(r"v?(\d+\.\d+(\.\d+)*)", _first_line(name, "--version"))
    return f"{name} {match[1]}" if match else f"{name} of an unknown version"


def _first_line(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip().partition("\n")[0]
