"""`mtetool diff` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtetool.guest import Memslot
from tests.cli.running import BASE, KIB, make_guest, run, set_tag

SLOTS = (Memslot(0, BASE, 64 * KIB), Memslot(1, 2 * BASE, 64 * KIB))


@pytest.fixture
def a(tmp_path: Path) -> Path:
    make_guest(tmp_path / "a", slots=SLOTS)
    return tmp_path / "a"


@pytest.fixture
def b(tmp_path: Path) -> Path:
    make_guest(tmp_path / "b", slots=SLOTS)
    set_tag(tmp_path / "b", BASE + 0x20, 0x40, 7)
    set_tag(tmp_path / "b", BASE + 0x60, 0x10, 8)
    set_tag(tmp_path / "b", 2 * BASE, 0x10, 1)
    return tmp_path / "b"


EXPECTED = [
    {"ipa": BASE + 0x20, "size_bytes": 0x40, "a": 0, "b": 7},
    {"ipa": BASE + 0x60, "size_bytes": 0x10, "a": 0, "b": 8},
    {"ipa": 2 * BASE, "size_bytes": 0x10, "a": 0, "b": 1},
]


def test_the_same(a: Path) -> None:
    done = run("diff", f"emu:{a}", f"emu:{a}")
    assert (done.status, done.out) == (0, "")
    assert run("diff", f"emu:{a}", f"emu:{a}", "--json").json["same"] is True


def test_any_mix_of_guests_snapshots_and_a_pipe(a: Path, b: Path, tmp_path: Path) -> None:
    for path in (a, b):
        assert run("save", f"emu:{path}", "-o", path.with_suffix(".s")).status == 0
    piped = a.with_suffix(".s").read_bytes()
    for left in (f"emu:{a}", a.with_suffix(".s"), "-"):
        for right in (f"emu:{b}", b.with_suffix(".s")):
            done = run("diff", left, right, "--json", stdin=piped)
            assert done.status == 1
            assert done.json["schema"] == "mtetool.diff/1"
            assert done.json["ranges"] == EXPECTED
            assert done.json["differing_bytes"] == 0x60
            assert done.json["differing_count"] == 3


def test_for_people(a: Path, b: Path) -> None:
    done = run("diff", f"emu:{b}", f"emu:{a}")
    assert done.status == 1
    assert [line.split() for line in done.out.splitlines()] == [
        ["0x40000020", "0x40", "7", "0"],
        ["0x40000060", "0x10", "8", "0"],
        ["0x80000000", "0x10", "1", "0"],
    ]


def test_a_range(a: Path, b: Path) -> None:
    asked = ["--range", f"{BASE + 0x50:#x}:0x20"]
    ranges = run("diff", f"emu:{a}", f"emu:{b}", "--json", *asked).json["ranges"]
    assert [(row["ipa"], row["size_bytes"]) for row in ranges] == [
        (BASE + 0x50, 0x10),
        (BASE + 0x60, 0x10),
    ]
    assert run("diff", f"emu:{a}", f"emu:{b}", "--range", f"{BASE + 0x1000:#x}:4K").status == 0


def test_what_only_one_has_is_absent_in_the_other(a: Path, tmp_path: Path) -> None:
    make_guest(tmp_path / "c", slots=SLOTS[:1])
    done = run("diff", f"emu:{a}", f"emu:{tmp_path / 'c'}", "--json")
    assert done.status == 1
    assert done.json["ranges"] == [{"ipa": 2 * BASE, "size_bytes": 64 * KIB, "a": 0, "b": None}]
    assert "absent" in run("diff", f"emu:{tmp_path / 'c'}", f"emu:{a}").out


def test_what_is_missing_cannot_be_compared(a: Path, tmp_path: Path) -> None:
    around = ["--range", f"{BASE:#x}:128K"]
    partial = tmp_path / "p"
    assert run("save", f"emu:{a}", "-o", partial, *around).status == 3
    done = run("diff", partial, partial)
    assert done.status == 3
    assert "not comparable: EFAULT: no memslot there" in done.out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--range", f"{BASE + 8:#x}:16"], "misaligned"),
        (["--range", "0:4K"], "out-of-range"),
    ],
)
def test_bad_requests(a: Path, b: Path, arguments: list[str], error: str) -> None:
    done = run("diff", f"emu:{a}", f"emu:{b}", "--json", *arguments)
    assert (done.status, done.error["error"]) == (2, error)


def test_standard_input_is_only_one() -> None:
    assert run("diff", "-", "-").status == 2
