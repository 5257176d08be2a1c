"""`mtetool verify` as a user meets it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.running import BASE, KIB, SLOTS, make_guest, run, set_tag


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    make_guest(tmp_path / "g", seed=3)
    return tmp_path / "g"


@pytest.fixture
def snapshot(guest: Path, tmp_path: Path) -> Path:
    assert run("save", f"emu:{guest}", "-o", tmp_path / "s").status == 0
    return tmp_path / "s"


def test_a_sound_one(snapshot: Path) -> None:
    done = run("verify", snapshot)
    assert (done.status, "sound" in done.out) == (0, True)
    report = run("verify", "-", "--json", stdin=snapshot.read_bytes()).json
    assert report["schema"] == "mtetool.verify/1"
    assert report["sound"] is True
    assert report["held_bytes"] == 832 * KIB
    assert report["against"] is None


def test_against_the_same_guest(snapshot: Path, guest: Path) -> None:
    report = run("verify", snapshot, "--against", f"emu:{guest}", "--json").json
    assert (report["same"], report["compared_bytes"]) == (True, 832 * KIB)


def test_against_a_guest_that_differs_in_two_places(snapshot: Path, guest: Path) -> None:
    at = BASE + 400 * KIB  # Not tagged so far.
    set_tag(guest, at, 32, 5)
    set_tag(guest, at + 4096, 16, 6)
    done = run("verify", snapshot, "--against", f"emu:{guest}")
    assert done.status == 1
    assert f"{at:#x}:0x20" in done.out
    report = run("verify", snapshot, "--against", f"emu:{guest}", "--json").json
    assert report["same"] is False
    assert report["differing"] == [
        {"ipa": at, "size_bytes": 32},
        {"ipa": at + 4096, "size_bytes": 16},
    ]
    assert (report["differing_count"], report["differing_bytes"]) == (2, 48)


def test_a_long_list_is_cut_and_says_so(snapshot: Path, guest: Path) -> None:
    for n in range(30):
        set_tag(guest, BASE + 400 * KIB + n * 4096 // 2, 16, 5)
    out = run("verify", snapshot, "--against", f"emu:{guest}").out
    assert "30 ranges" in out
    assert "and 10 more" in out


def test_a_partial_one(guest: Path, tmp_path: Path) -> None:
    file = tmp_path / "p"
    assert run("save", f"emu:{guest}", "-o", file, "--range", f"{BASE:#x}:1M").status == 3
    done = run("verify", file)
    assert done.status == 3
    assert f"{BASE + 512 * KIB:#x}:0x80000" in done.out
    assert run("verify", file, "--against", f"emu:{guest}").status == 3


def test_against_what_is_no_guest(snapshot: Path, tmp_path: Path) -> None:
    done = run("verify", snapshot, "--against", snapshot, "--json")
    assert (done.status, done.error["error"]) == (2, "bad-source")
    no_mte = make_guest(tmp_path / "n", mte=False)
    done = run("verify", snapshot, "--against", no_mte, "--json")
    assert (done.status, done.error["error"]) == (4, "mte-off")


def test_progress_for_programs(snapshot: Path) -> None:
    done = run("verify", snapshot, "--progress", "json")
    assert '"mtetool.progress/1"' in done.err
    assert run("verify", snapshot, "--progress", "json", "--quiet").err == ""


def test_several_files_are_all_checked(snapshot: Path, guest: Path, tmp_path: Path) -> None:
    damaged, copy = tmp_path / "damaged", tmp_path / "copy"
    data = bytearray(snapshot.read_bytes())
    copy.write_bytes(data)
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    done = run("verify", snapshot, damaged, tmp_path / "none", copy)
    assert done.status == 5
    assert [line.split(":")[0] for line in done.out.splitlines()] == [str(snapshot), str(copy)]
    assert (str(damaged) in done.err, "no such file" in done.err) == (True, True)
    report = run("verify", snapshot, damaged, copy, "--json")
    assert report.status == 5
    kinds = [row["schema"] for row in report.json["files"]]
    assert kinds == ["mtetool.verify/1", "mtetool.error/1", "mtetool.verify/1"]
    assert report.json["files"][1]["path"] == str(damaged)
    assert run("verify", snapshot, copy).status == 0
    assert run("verify", snapshot, copy, "--against", f"emu:{guest}").status == 2


def test_a_slot_that_has_moved(snapshot: Path, tmp_path: Path) -> None:
    at = 2 * BASE
    slots = tuple(replace(slot, ipa=at) if slot.ipa == BASE else slot for slot in SLOTS)
    moved = make_guest(tmp_path / "moved", seed=3, slots=slots)
    asked = ("--map", f"{BASE:#x}={at:#x}")
    assert run("restore", snapshot, moved, *asked).status == 0
    report = run("verify", snapshot, "--against", moved, *asked, "--json").json
    assert (report["same"], report["compared_bytes"]) == (True, 832 * KIB)
    set_tag(tmp_path / "moved", at + 400 * KIB, 16, 5)
    report = run("verify", snapshot, "--against", moved, *asked, "--json").json
    assert report["differing"] == [{"ipa": at + 400 * KIB, "size_bytes": 16}]
    assert run("verify", snapshot, "--against", moved).status == 3
    assert run("verify", snapshot, *asked).status == 2
