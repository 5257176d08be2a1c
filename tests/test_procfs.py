"""Text of /proc with names that are made to look like more of that text."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtetool import procfs
from mtetool.attach import gadgets, restart, seccomp
from mtetool.backends.proc import smaps
from mtetool.backends.proc.smaps import tagged_mappings
from mtetool.vmm import proc

# Everything that Python takes for the end of a line.
ENDS = ("\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")

# A program that gives itself a name, reports that, and waits.
_NAMED = """
import ctypes, sys
assert ctypes.CDLL(None).prctl(15, sys.argv[1].encode("utf-8", "surrogateescape"), 0, 0, 0) == 0
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def _named(name: str) -> Iterator[int]:
    words = [sys.executable, "-c", _NAMED, name]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.mark.parametrize("end", ENDS)
def test_names_of_files_do_not_break_lines(tmp_path: Path, end: str) -> None:
    names = [
        f"a{end}b",
        f"a{end}0-1 r-xp 0 0:0 0 libc.so",
        f"{end}VmFlags: mt",
        f"x{end}",
        "é\udcff",
    ]
    for name in names:
        path = tmp_path / name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        path.write_bytes(bytes(4096))
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ),
        ):
            shown = str(path).replace("\n", "\\012")
            found = procfs.mappings(os.getpid())
            assert [m.name for m in found].count(shown) == 1
            assert all(m.start < m.end and len(m.flags) == 4 for m in found)
            space = smaps.AddressSpace(os.getpid())
            assert space.tagged_mappings() == []
            assert [m.name for m in space._mappings()].count(shown) == 1
            space.close()


def test_odd_lines_of_maps_are_passed_over() -> None:
    lines = ["", "x", "0-1", "0-1 r", "0-1 r-xp 0 0:0", "z-y r-xp 0 0:0 0", "0-1 r-xp 0 0:0 z n"]
    assert procfs.parsed(lines) == []
    assert list(tagged_mappings([*lines, "VmFlags: mt"])) == []
    good = "1000-2000 r-xp 00000000 00:00 7 /a b"
    assert procfs.parsed([*lines, good]) == [procfs.Mapping(0x1000, 0x2000, "r-xp", 7, "/a b")]


@pytest.mark.parametrize(
    "name",
    [
        *(f"{end}Tgid: x" for end in (*ENDS, ") R 1 1 ", "\udcff")),
        *(
            f"\f{field}"
            for field in ("SigCgt: zz", "Seccomp: x", "NSpid: 1", "Uid: x x", "State: Z")
        ),
    ],
)
def test_names_of_programs_do_not_lie(name: str) -> None:
    with _named(name) as pid:
        status = procfs.status_of(pid)
        assert (status["Tgid"], status["State"][:1] in "RSD") == (str(pid), True)
        assert proc.inner_tids(pid) == {pid}
        assert proc.uid_of(pid) == os.getuid()
        assert proc.find(pid).pid == pid
        assert proc.start_time(pid) > 0
        assert restart._caught(pid, pid, 2)
        assert seccomp._mode(pid, pid) == 0
        assert proc.runs_guest(pid) is False


def test_a_command_line_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", *["x"] * 10]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert proc.command_line(process.pid) == words
        process.kill()
    words += ["y" * 100_000] * 11
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert proc.command_line(process.pid) == []
        process.kill()


def test_code_is_searched_within_bounds(tmp_path: Path) -> None:
    """Mappings with a library's name can be many, of any size, or end after their file."""
    exits = bytes.fromhex("a80b80d2 000080d2 010000d4")
    path = tmp_path / "libc.so.6"
    path.write_bytes(exits.ljust(4096, b"\0"))
    os.truncate(path, 1 << 40)
    with path.open("rb") as file:
        huge = mmap.mmap(file.fileno(), 1 << 38, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        small = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)
    ours = [m for m in procfs.mappings(os.getpid()) if m.name == str(path)]
    assert sorted(m.end - m.start for m in ours) == [4096, 1 << 38]
    ours.sort(key=lambda m: m.start - m.end)
    assert gadgets._find_exit(os.getpid(), ours) == ours[1].start
    os.truncate(path, 0)
    assert gadgets._find_exit(os.getpid(), ours) is None
    huge.close()
    small.close()
