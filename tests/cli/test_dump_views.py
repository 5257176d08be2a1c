"""The forms of `mtetool dump` for people: on terminals, around an address, followed."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from mtetool.cli.ranges import size
from mtetool.guest import Memslot
from tests.cli.running import (
    BASE,
    KIB,
    SLOTS,
    command,
    make_guest,
    run,
    set_tag,
    spawn,
    tags_of,
)

# A slot with a short run, and one behind a hole.
TWO = (Memslot(0, BASE, 64 * KIB), Memslot(1, BASE + 256 * KIB, 64 * KIB))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    make_guest(tmp_path / "small", slots=TWO)
    set_tag(tmp_path / "small", BASE + 0x1010, 0x30, 7)
    set_tag(tmp_path / "small", BASE + 0x2000, 0x10, 10)
    return tmp_path / "small"


@pytest.fixture
def busy(tmp_path: Path) -> Path:
    """Too many runs for a terminal."""
    make_guest(tmp_path / "busy", seed=3)
    return tmp_path / "busy"


def on_terminal(*arguments: str | Path, columns: int = 80, lines: int = 40, **env: str) -> str:
    """What `mtetool dump` prints on a terminal of that size."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        command("dump", *arguments),
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env={**plain, "PYTHONPATH": str(root), "TERM": "dumb", "PYTHONUTF8": "1", **env},
    )
    os.close(terminal)
    out = b""
    with suppress(OSError):
        while data := os.read(controller, 65536):
            out += data
    os.close(controller)
    assert child.wait(timeout=60) == 0
    return out.decode().replace("\r\n", "\n")


# --- on a terminal --------------------------------------------------------------------------


def test_few_rows_are_all_there_is(small: Path) -> None:
    assert on_terminal(f"emu:{small}") == run("dump", f"emu:{small}").out


def test_many_rows_begin_with_a_summary(busy: Path) -> None:
    out = on_terminal(f"emu:{busy}")
    tagged = sum(int((tags_of(busy, slot) != 0).sum()) for slot in SLOTS)
    assert f"tagged   {size(tagged * 16)}, " in out
    assert re.search(r"^3 +\d", out, re.MULTILINE)
    assert "a cell is 4 KiB" in out
    assert "These are the first 20 rows" in out
    assert len(out.splitlines()) < 60
    assert "\x1b" not in out


def test_colours_only_where_they_are_wanted(small: Path) -> None:
    assert "\x1b[38;5;" in on_terminal(f"emu:{small}", TERM="xterm-256color")
    assert "\x1b" not in on_terminal(f"emu:{small}", TERM="xterm-256color", NO_COLOR="1")


def test_a_narrow_terminal_without_utf8(busy: Path) -> None:
    for form in ("text", "map", "grid"):
        more = ("--range", f"{BASE:#x}:4K") if form == "grid" else ()
        out = on_terminal(
            f"emu:{busy}", "--output", form, *more, columns=20, PYTHONUTF8="0", LC_ALL="C",
            PYTHONIOENCODING="ascii",
        )  # fmt: skip
        assert out.isascii()
        rows = [line for line in out.splitlines() if line.lstrip().startswith("0x4")]
        assert rows
        assert form == "text" or max(map(len, rows)) <= 20


def test_granules_on_a_terminal_are_a_grid(small: Path) -> None:
    asked = (f"emu:{small}", "--range", f"{BASE + 0x1000:#x}:512")
    assert on_terminal(*asked, "--granules") == (
        "    0x40001000  0 7 7 7 0 0 0 0  0 0 0 0 0 0 0 0\n"
        "    0x40001100  0 0 0 0 0 0 0 0  0 0 0 0 0 0 0 0\n"
    )


# --- maps and grids -------------------------------------------------------------------------


def test_a_grid_leaves_out_equal_lines(small: Path) -> None:
    out = run("dump", f"emu:{small}", "--output", "grid").out
    zeros = "  0 0 0 0 0 0 0 0  0 0 0 0 0 0 0 0"
    assert out.splitlines() == [
        f"    0x40000000{zeros}",
        "*",
        f"    0x40000f00{zeros}",
        "    0x40001000  0 7 7 7 0 0 0 0  0 0 0 0 0 0 0 0",
        f"    0x40001100{zeros}",
        "*",
        f"    0x40001f00{zeros}",
        "    0x40002000  a 0 0 0 0 0 0 0  0 0 0 0 0 0 0 0",
        f"    0x40002100{zeros}",
        "*",
        f"    0x4000ff00{zeros}",
        f"    0x40040000{zeros}",
        "*",
        f"    0x4004ff00{zeros}",
    ]


def test_a_map_shows_where_tags_are(small: Path) -> None:
    set_tag(small, BASE + 0x3000, 0x1000, 1)
    first, _, *rows = run("dump", f"emu:{small}", "--output", "map").out.splitlines()
    assert first == "a cell is 4 KiB, a line 256 KiB"
    assert rows == ["    0x40000000  .--#............", "    0x40040000  ................"]


def test_what_cannot_be_read_is_shown(small: Path) -> None:
    around = ("--range", f"{BASE + 60 * KIB:#x}:8K")
    out = run("dump", f"emu:{small}", "--output", "map", *around)
    assert (out.status, out.out.splitlines()[2]) == (3, "    0x4000f000  .?")
    out = run("dump", f"emu:{small}", "--output", "grid", *around)
    assert out.status == 3
    assert "    0x40010000  ? ? ?" in out.out


# --- which rows -----------------------------------------------------------------------------


def test_chosen_rows(small: Path) -> None:
    def rows(*more: str) -> list[list[str]]:
        done = run("dump", f"emu:{small}", *more)
        return [line.split() for line in done.out.splitlines()]

    seven, ten = ["0x40001010", "0x30", "7"], ["0x40002000", "0x10", "a"]
    assert rows("--only-tagged") == [seven, ten]
    assert rows("--tag", "a") == [ten]
    assert rows("--tag", "a", "--tag", "7", "--limit", "1") == [seven]
    assert rows("--slot", "1") == [["0x40040000", "0x10000", "0"]]
    assert rows("--tag", "7", "--granules") == [
        ["0x40001010", "7"],
        ["0x40001020", "7"],
        ["0x40001030", "7"],
    ]


def test_lines_of_json(small: Path) -> None:
    done = run("dump", f"emu:{small}", "--output", "jsonl", "--range", f"{BASE + 60 * KIB:#x}:8K")
    head, *rows = map(json.loads, done.out.splitlines())
    assert (done.status, head["schema"]) == (3, "mtetool.dump-lines/1")
    assert rows == [
        {"ipa": BASE + 60 * KIB, "size_bytes": 4096, "tag": 0},
        {
            "tag": None,
            "ipa": BASE + 64 * KIB,
            "size_bytes": 4096,
            "errno": "EFAULT",
            "reason": "no memslot there",
        },
    ]
    error = run("dump", "emu:/nix", "--output", "jsonl").err
    assert json.loads(error)["schema"] == "mtetool.error/1"


@pytest.mark.parametrize(
    "words",
    [
        "--context 3",
        "--at 0x40000000 --range 0x40000000:16",
        "--at 0x40000000 --output raw",
        "--at nix",
        "--tag 16",
        "--output map --only-tagged",
        "--output json --limit 3",
        "--slot 7",
        "--slot 0 --range 0x40000000:16",
        "--interval 3",
        "--follow --at 0x40000000",
        "--follow --output json",
        "--base nix",
    ],
)
def test_options_that_mean_nothing(small: Path, words: str) -> None:
    done = run("dump", f"emu:{small}", *words.split())
    assert (done.status, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert "error" in done.err


# --- an address -----------------------------------------------------------------------------


def test_a_pointer_and_its_memory(small: Path) -> None:
    done = run("dump", f"emu:{small}", "--at", f"{3 << 56 | BASE + 0x1018:#x}", "--context", "3")
    assert done.status == 1
    assert done.out.splitlines() == [
        "pointer 0x300000040001018: tag 3, address 0x40001018",
        "0x40001018: tag 7, in slot 0, page 0x40001000",
        "run: 0x40001010 to 0x4000103f, 48 bytes of tag 7",
        "pointer 3, memory 7: mismatch",
        "    0x40000f00                               0 0",
        "    0x40001000  0[7]7 7 0",
    ]
    same = run("dump", f"emu:{small}", "--at", f"{7 << 56 | BASE + 0x1018:#x}")
    assert (same.status, "pointer 7, memory 7: match\n" in same.out) == (0, True)
    plain = run("dump", f"emu:{small}", "--at", f"{BASE + 0x1018:#x}", "--context", "0")
    assert (plain.status, len(plain.out.splitlines())) == (0, 2)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (BASE + 64 * KIB, "the nearest, 0x40000000:0x10000, ends right before it"),
        (BASE + 250 * KIB, "the nearest, 0x40040000:0x10000, begins 0x1800 bytes after it"),
        (0, "the nearest, 0x40000000:0x10000, begins 0x40000000 bytes after it"),
        (0xFFFF_8000_1234_5678, "a virtual address of a kernel"),
        ((1 << 64) - 1, "not in the memory of"),
    ],
)
def test_addresses_outside_are_answered_in_words(small: Path, address: int, words: str) -> None:
    done = run("dump", f"emu:{small}", "--at", f"{address:#x}")
    assert done.status == 3
    assert words in done.out


def test_an_address_that_cannot_be_read(small: Path) -> None:
    fault = f"EFAULT,on=read,at={BASE + 0x1000:#x}"
    assert run("emu", "fault", small, "--fault", fault).status == 0
    done = run("dump", f"emu:{small}", "--at", f"{BASE + 0x1010:#x}", "--at", f"{BASE:#x}")
    assert done.status == 3
    assert f"{BASE + 0x1010:#x}: its tag cannot be read: EFAULT" in done.out
    assert f"{BASE:#x}: tag 0" in done.out


def test_the_example_of_the_page(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "man" / "mtetool-dump.1").read_text().replace("\\-", "-")
    example = page.partition("$ mtetool dump emu:web.emu ")[2].partition("\n.fi")[0]
    words, _, printed = example.partition("\n")
    web = make_guest(tmp_path / "web", slots=(Memslot(0, 0x4000_0000, 64 << 20),))
    set_tag(tmp_path / "web", 0x41CA_4010, 32, 7)
    assert run("dump", web, *words.split()).out == printed + "\n"


# --- followed -------------------------------------------------------------------------------


def test_following_shows_changes_and_ends_with_ctrl_c(small: Path, tmp_path: Path) -> None:
    child = spawn(
        "dump", f"emu:{small}", "--follow", "--interval", "0.05", "--output", "jsonl",
        "--range", f"{BASE + 0x1000:#x}:8K",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    assert child.stdout is not None
    head = json.loads(child.stdout.readline())
    assert head["schema"] == "mtetool.follow-lines/1"
    set_tag(small, BASE, 16, 3)  # not in the range
    set_tag(small, BASE + 0x1020, 16, 9)
    change = json.loads(child.stdout.readline())
    assert change.pop("time") > 0
    assert change == {"ipa": BASE + 0x1020, "size_bytes": 16, "a": 7, "b": 9}
    child.send_signal(2)
    out, err = child.communicate(timeout=30)
    assert child.returncode in (-2, 130)
    assert (out, b"Traceback" in err) == (b"", False)


def test_following_ends_after_a_count(small: Path) -> None:
    done = run("dump", f"emu:{small}", "--follow", "--interval", "0.05", "--count", "2")
    assert (done.status, done.out) == (0, "")
    assert "following the tags of 128 KiB" in done.err


def test_only_guests_are_followed(small: Path, tmp_path: Path) -> None:
    assert run("save", f"emu:{small}", "-o", tmp_path / "s").status == 0
    done = run("dump", tmp_path / "s", "--follow")
    assert (done.status, "reads a live guest" in done.err) == (2, True)
