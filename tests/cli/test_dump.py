"""`mtetool dump` as a user meets it."""

from __future__ import annotations

import os
import pty
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mtetool.guest import Memslot
from tests.cli.running import BASE, KIB, ROM, SLOTS, make_guest, run, set_tag, spawn, tags_of


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    make_guest(tmp_path / "g", seed=3)
    return tmp_path / "g"


@pytest.fixture
def quiet_guest(tmp_path: Path) -> Path:
    """One slot, one tagged run."""
    make_guest(tmp_path / "q", slots=(Memslot(0, BASE, 64 * KIB),))
    set_tag(tmp_path / "q", BASE + 0x1010, 0x30, 10)
    return tmp_path / "q"


def test_runs_for_people(quiet_guest: Path) -> None:
    done = run("dump", f"emu:{quiet_guest}")
    assert done.status == 0
    assert [line.split() for line in done.out.splitlines()] == [
        ["0x40000000", "0x1010", "0"],
        ["0x40001010", "0x30", "a"],
        ["0x40001040", "0xefc0", "0"],
    ]


def test_granules_of_a_range(quiet_guest: Path) -> None:
    done = run("dump", f"emu:{quiet_guest}", "--granules", "--range", f"{BASE + 0x1000:#x}:0x30")
    assert [line.split() for line in done.out.splitlines()] == [
        ["0x40001000", "0"],
        ["0x40001010", "a"],
        ["0x40001020", "a"],
    ]


def test_runs_for_programs(quiet_guest: Path) -> None:
    report = run("dump", f"emu:{quiet_guest}", "--json").json
    assert report["schema"] == "mtetool.dump/1"
    assert report["runs"] == [
        {"ipa": BASE, "size_bytes": 0x1010, "tag": 0},
        {"ipa": BASE + 0x1010, "size_bytes": 0x30, "tag": 10},
        {"ipa": BASE + 0x1040, "size_bytes": 0xEFC0, "tag": 0},
    ]
    assert report["missing"] == []
    one = run("dump", f"emu:{quiet_guest}", "--json", "--granules", "--range", f"{BASE:#x}:16").json
    assert one["granules"] == [{"ipa": BASE, "tag": 0}]


def test_runs_add_up_to_the_guest(guest: Path) -> None:
    runs = run("dump", f"emu:{guest}", "--json").json["runs"]
    for slot in SLOTS:
        inside = [row for row in runs if slot.ipa <= row["ipa"] < slot.end]
        tags = [np.full(row["size_bytes"] // 16, row["tag"]) for row in inside]
        assert np.array_equal(np.concatenate(tags), tags_of(guest, slot))
        pairs = pairwise(inside)
        assert all(a["tag"] != b["tag"] for a, b in pairs)


def test_a_guest_its_snapshot_and_a_pipe_read_the_same(guest: Path, tmp_path: Path) -> None:
    assert run("save", f"emu:{guest}", "-o", tmp_path / "s").status == 0
    data = (tmp_path / "s").read_bytes()
    for form in ("text", "raw"):
        expected = run("dump", f"emu:{guest}", "--output", form).raw
        assert run("dump", tmp_path / "s", "--output", form).raw == expected
        assert run("dump", "-", "--output", form, stdin=data).raw == expected


def test_raw_is_tags_and_nothing_else(guest: Path) -> None:
    raw = run("dump", f"emu:{guest}", "--output", "raw").raw
    assert raw == b"".join(tags_of(guest, slot).tobytes() for slot in SLOTS)


def test_what_cannot_be_read(guest: Path, tmp_path: Path) -> None:
    hole = BASE + 512 * KIB
    around = ["--range", f"{hole - 32:#x}:64"]
    done = run("dump", f"emu:{guest}", *around, "--output", "raw")
    assert (done.status, done.raw[2:]) == (3, b"\xff\xff")
    assert "32 bytes in 1 range could not be read" in done.err
    assert run("dump", f"emu:{guest}", *around, "--quiet").err == ""
    text = run("dump", f"emu:{guest}", *around)
    assert text.status == 3
    assert "missing: EFAULT: no memslot there" in text.out
    report = run("dump", f"emu:{guest}", *around, "--json")
    assert report.status == 3
    assert report.json["missing_bytes"] == 32
    assert run("save", f"emu:{guest}", "-o", tmp_path / "s").status == 0
    assert "not in the snapshot" in run("dump", tmp_path / "s", *around).out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--range", f"{BASE + 8:#x}:16"], "misaligned"),
        (["--range", f"{BASE:#x}:8"], "misaligned"),
        (["--range", "0:4K"], "out-of-range"),
        (["--output", "gif"], "usage"),
    ],
)
def test_bad_requests(guest: Path, tmp_path: Path, arguments: list[str], error: str) -> None:
    assert run("save", f"emu:{guest}", "-o", tmp_path / "s").status == 0
    for source in (f"emu:{guest}", str(tmp_path / "s")):
        done = run("dump", source, "--json", *arguments)
        assert (done.status, done.error["error"]) == (2, error)


def test_raw_has_no_granules(guest: Path) -> None:
    assert run("dump", f"emu:{guest}", "--output", "raw", "--granules").status == 2


def test_raw_is_not_for_terminals(quiet_guest: Path) -> None:
    controller, terminal = pty.openpty()
    child = spawn(
        "dump", f"emu:{quiet_guest}", "--output", "raw", stdout=terminal, stderr=subprocess.PIPE
    )
    _, err = child.communicate(timeout=30)
    os.close(terminal)
    os.close(controller)
    assert child.returncode == 2
    assert b"terminal" in err


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    slots = (Memslot(0, BASE, 8192 * KIB),)
    guest = make_guest(tmp_path / "g", seed=5, slots=slots)
    child = spawn("dump", guest, "--granules", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().lstrip().startswith(b"0x40000000")
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait(timeout=30) == 141


def test_the_rom_comes_first(guest: Path) -> None:
    assert run("dump", f"emu:{guest}").out.lstrip().startswith(f"{ROM:#x}")
