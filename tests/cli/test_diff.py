"""`mtetool diff` as a user meets it."""

from __future__ import annotations

import json
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


def test_totals(a: Path, b: Path, tmp_path: Path) -> None:
    set_tag(a, BASE + 0x60, 0x20, 3)
    done = run("diff", f"emu:{a}", f"emu:{b}", "--stat", "--json")
    assert done.status == 1
    report = done.json
    assert (report["differing_bytes"], report["differing_count"]) == (0x70, 4)
    kinds = [report[f"{kind}_bytes"] for kind in ("tagged", "untagged", "retagged", "only_a")]
    assert kinds == [0x50, 0x10, 0x10, 0]
    assert [slot["differing_bytes"] for slot in report["slots"]] == [0x60, 0x10]
    text = run("diff", f"emu:{a}", f"emu:{b}", "--stat").out
    assert "differing  112 bytes in 4 ranges\n" in text
    make_guest(tmp_path / "c", slots=SLOTS[:1])
    alone = run("diff", f"emu:{b}", f"emu:{tmp_path / 'c'}", "--stat", "--json").json
    assert alone["only_a_bytes"] == 64 * KIB
    same = run("diff", f"emu:{a}", f"emu:{a}", "--stat", "--json")
    assert (same.status, same.json["same"], same.json["compared_bytes"]) == (0, True, 128 * KIB)


def test_brief_reads_no_further_than_it_must(a: Path, b: Path) -> None:
    fault = f"EFAULT,on=read,at={2 * BASE:#x}"
    assert run("emu", "fault", b, "--fault", fault).status == 0
    done = run("diff", f"emu:{a}", f"emu:{b}", "--brief")
    assert (done.status, done.err) == (1, "")
    assert done.out == f"emu:{a} and emu:{b} differ, first at {BASE + 0x20:#x}\n"
    same = run("diff", f"emu:{a}", f"emu:{a}", "--brief")
    assert (same.status, same.out) == (0, "")
    unknown = run("diff", f"emu:{b}", f"emu:{b}", "--brief", "--json")
    assert (unknown.status, unknown.json["missing_bytes"]) == (3, 4096)


def test_limits_and_lines(a: Path, b: Path) -> None:
    done = run("diff", f"emu:{a}", f"emu:{b}", "--limit", "2")
    assert (done.status, len(done.out.splitlines())) == (1, 2)
    assert "only the first 2 rows" in done.err
    report = run("diff", f"emu:{a}", f"emu:{b}", "--limit", "2", "--json").json
    assert report["ranges"] == EXPECTED[:2]
    assert report["differing_count"] == 3
    head, *rows = map(
        json.loads, run("diff", f"emu:{a}", f"emu:{b}", "--output", "jsonl").out.splitlines()
    )
    assert (head["schema"], rows) == ("mtetool.diff-lines/1", EXPECTED)


def test_deltas_with_their_bases(a: Path, tmp_path: Path) -> None:
    base, one, two = tmp_path / "base", tmp_path / "one", tmp_path / "two"
    assert run("save", f"emu:{a}", "-o", base).status == 0
    set_tag(a, BASE + 0x20, 0x10, 5)
    assert run("save", f"emu:{a}", "--base", base, "-o", one).status == 0
    set_tag(a, BASE + 0x40, 0x10, 6)
    bases = ("--base", base, "--base", one)
    assert run("save", f"emu:{a}", *bases, "-o", two).status == 0
    # In any order, for both, and for a base itself.
    mixed = ("--base", one, "--base", base)
    rows = run("diff", one, two, *mixed, "--json").json["ranges"]
    assert [row["ipa"] for row in rows] == [BASE + 0x40]
    assert run("diff", base, two, *mixed, "--json").json["differing_count"] == 2
    assert run("diff", two, f"emu:{a}", *mixed).status == 0
    assert "6" in run("dump", two, *bases, "--only-tagged").out
    report = run("stats", two, *bases, "--json").json
    assert report["tagged_bytes"] == 0x20
    lacking = run("diff", base, two, "--base", base, "--json")
    assert (lacking.status, lacking.error["error"]) == (2, "base-needed")


def test_moved_slots(b: Path, tmp_path: Path) -> None:
    at = 3 * BASE
    make_guest(tmp_path / "c", slots=(SLOTS[0], Memslot(1, at, 64 * KIB)))
    moved = ("--map", f"{2 * BASE:#x}={at:#x}")
    report = run("diff", f"emu:{b}", f"emu:{tmp_path / 'c'}", *moved, "--json").json
    assert [(row["ipa"], row["a"], row["b"]) for row in report["ranges"]] == [
        (BASE + 0x20, 7, 0),
        (BASE + 0x60, 8, 0),
        (at, 1, 0),
    ]
    snapshot = tmp_path / "s"
    assert run("save", f"emu:{b}", "-o", snapshot).status == 0
    for word in ("nix=1", "0x1234=0x1000", f"{BASE:#x}={2 * BASE:#x}", f"{BASE:#x}=8"):
        done = run("diff", snapshot, f"emu:{b}", "--map", word)
        assert done.status in (2, 4), word
        assert done.out == ""


@pytest.mark.parametrize("words", ["--stat --brief", "--stat --limit 3", "--brief --output jsonl"])
def test_options_that_exclude_each_other(a: Path, words: str) -> None:
    assert run("diff", f"emu:{a}", f"emu:{a}", *words.split()).status == 2


def test_standard_input_is_only_one() -> None:
    assert run("diff", "-", "-").status == 2
