"""The progress bar, on real terminals (pty) of many widths."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mtetool.cli.bar import line
from tests.cli.running import command, make_guest, run

# --- contents of the line --------------------------------------------------------------------


def test_a_wide_line_has_everything_in_one_unit() -> None:
    text = line("saving kvm:160", 96 << 20, 256 << 20, 2.0, 100)
    assert text == (
        "saving kvm:160 [###########-------------------]  37% 96.0/256.0 MiB 48.0 MiB/s 0:03"
    )
    assert line("saving x", 5 << 20, None, 1.0, 60) == "saving x 5.0 MiB 5.0 MiB/s"


def test_a_narrow_line_keeps_what_matters() -> None:
    shown = [line("saving emu:/tmp/g", 1 << 20, 4 << 20, 1.0, columns) for columns in (59, 39, 19)]
    assert shown == [
        "saving emu:/tmp/g  25% 1.0/4.0 MiB 1.0 MiB/s 0:03",
        "saving emu:/tmp/g  25% 1.0/4.0 MiB",
        "saving emu:...  25%",
    ]


@given(
    st.text(st.characters(blacklist_categories=["C", "Z"])),
    st.integers(0, 1 << 50),
    st.none() | st.integers(0, 1 << 50),
    st.floats(0, 1e6),
    st.integers(0, 200),
)
def test_it_fits_any_width(
    label: str, done: int, total: int | None, elapsed: float, columns: int
) -> None:
    assert cell_len(line(label, done, total, elapsed, columns)) <= columns


# --- on terminals ---------------------------------------------------------------------------


@contextmanager
def terminal(words: list[str], columns: int) -> Iterator[int]:
    """Run a command on a terminal of its own; yield the other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def control() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=control,
        env={**os.environ, "PYTHONPATH": str(root), "PS1": "$ ", "TERM": "xterm"},
    )
    os.close(theirs)
    try:
        yield ours
    finally:
        os.close(ours)
        child.kill()
        child.wait()


def read_until(fd: int, pattern: bytes = b"(?!)") -> bytes:
    """Read until `pattern` has appeared, or until the terminal is closed."""
    data = b""
    while not re.search(pattern, data):
        assert select.select([fd], [], [], 20)[0], f"nothing more arrived after {data!r}"
        try:
            part = os.read(fd, 4096)
        except OSError:  # EIO: no process has it open any more
            part = b""
        if not part:
            break
        data += part
    return data


def slow_guest(path: Path, rate: str = "1M/s") -> str:
    guest = make_guest(path, seed=3)
    assert run("emu", "fault", guest, "--fault", f"slow={rate}").status == 0
    return guest


@pytest.mark.parametrize("columns", [200, 80, 59, 40, 20, 5, 1, 0])
def test_it_fits_the_terminal_and_leaves_nothing(tmp_path: Path, columns: int) -> None:
    guest = slow_guest(tmp_path / "g", "4M/s")
    with terminal(command("save", guest, "-o", tmp_path / "s"), columns) as fd:
        seen = read_until(fd).decode()
    # Colours, and nothing that would have to be undone, like a hidden cursor.
    seen = re.sub(r"\x1b\[[\d;]*m", "", seen)
    bars, _, report = seen.rpartition("saved the tags")
    assert "\x1b" not in seen
    assert "snapshot:" in report
    drawn = bars.split("\r")
    assert all(cell_len(text) < (columns or 80) for text in drawn)
    assert "\n" not in bars
    assert drawn[-1] == ""
    if columns >= 20:
        assert any("%" in text for text in drawn)


def test_a_pipeline_shows_one_bar_at_a_time(tmp_path: Path) -> None:
    guest, target = slow_guest(tmp_path / "g"), make_guest(tmp_path / "t", seed=4)
    save = shlex.join(command("save", guest, "-o", "-"))
    restore = shlex.join(command("restore", "-", target))
    with terminal(["bash", "-c", f"{save} | {restore}"], 80) as fd:
        seen = read_until(fd).decode()
    words = re.findall(r"\r(saving|restoring)", seen)
    changes = sum(a != b for a, b in pairwise(words))
    assert words
    assert changes <= 1, words


def test_a_stopped_one_has_hidden_nothing_and_goes_on(tmp_path: Path) -> None:
    guest = slow_guest(tmp_path / "g")
    words = shlex.join(command("save", guest, "-o", tmp_path / "s"))
    with terminal(["bash", "--norc", "--noprofile", "--noediting", "-i"], 80) as fd:
        os.write(fd, words.encode() + b"\n")
        seen = read_until(fd, rb"\rsaving .*%")
        os.write(fd, b"\x1a")
        seen += read_until(fd, rb"Stopped")
        os.write(fd, b"fg\n")
        seen += read_until(fd, rb"saved the tags of[^$]*\$ ")
        os.write(fd, b"exit\n")
        seen += read_until(fd)
    assert b"saved the tags of" in seen
    assert b"\x1b[?25l" not in seen


def test_nothing_is_drawn_in_the_background(tmp_path: Path) -> None:
    guest = slow_guest(tmp_path / "g", "4M/s")
    words = shlex.join(command("save", guest, "-o", tmp_path / "s"))
    with terminal(["bash", "--norc", "--noprofile", "-c", f"set -m; {words} & wait"], 80) as fd:
        seen = read_until(fd)
    assert b"saved the tags of" in seen
    assert b"saving" not in seen
