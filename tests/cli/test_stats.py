"""`mtetool stats` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtetool.guest import Memslot
from tests.cli.running import BASE, KIB, make_guest, run, set_tag

SLOTS = (Memslot(0, BASE, 64 * KIB), Memslot(1, 2 * BASE, 64 * KIB))


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """Four objects of two tags, in the first slot, and an untagged second one."""
    make_guest(tmp_path / "g", slots=SLOTS)
    for n, tag in enumerate((3, 5, 3, 3)):
        set_tag(tmp_path / "g", BASE + n * 0x80, 0x40, tag)
    return tmp_path / "g"


def test_for_programs(guest: Path) -> None:
    report = run("stats", f"emu:{guest}", "--json").json
    assert report["schema"] == "mtetool.stats/1"
    assert (report["read_bytes"], report["tagged_bytes"]) == (128 * KIB, 0x100)
    assert report["tag_granules"][3] == 12
    assert report["tag_runs"][3] == 3
    lengths = {"from_bytes": 64, "below_bytes": 128, "runs": 4, "bytes": 256}
    assert report["run_lengths"] == [lengths]
    assert report["entropy_bits"] == pytest.approx(0.811, abs=0.001)
    assert report["collision_share"] == pytest.approx(0.625)
    assert report["same_next_share"] == pytest.approx(0.75)
    # Of three objects that have another after the gap, one has the same tag as that.
    assert report["skip_one_share"] == pytest.approx(1 / 3)
    first, second = report["slots"]
    assert (first["tagged_bytes"], second["tagged_share"]) == (0x100, 0)
    assert second["entropy_bits"] is None


def test_for_people(guest: Path) -> None:
    out = run("stats", f"emu:{guest}").out
    assert "tagged   256 bytes, 0.20 %" in out
    assert "entropy            0.811 bits by granule" in out
    assert "3               12  75.00 %  ####" in out
    assert "64-112                   4  100.00 %" in out
    assert out.isascii()


def test_the_same_of_a_snapshot_and_a_pipe(guest: Path, tmp_path: Path) -> None:
    assert run("save", f"emu:{guest}", "-o", tmp_path / "s").status == 0
    expected = run("stats", f"emu:{guest}", "--json").json
    data = (tmp_path / "s").read_bytes()
    for source in (tmp_path / "s", "-"):
        found = run("stats", source, "--json", stdin=data).json
        assert {**found, "source": None} == {**expected, "source": None}


def test_a_part(guest: Path) -> None:
    report = run("stats", f"emu:{guest}", "--json", "--range", f"{BASE:#x}:0x80").json
    assert (report["read_bytes"], report["tagged_bytes"]) == (0x80, 0x40)
    report = run("stats", f"emu:{guest}", "--json", "--slot", "1").json
    assert (report["read_bytes"], report["tagged_bytes"], len(report["slots"])) == (64 * KIB, 0, 1)


def test_what_cannot_be_read(guest: Path) -> None:
    done = run("stats", f"emu:{guest}", "--json", "--range", f"{BASE:#x}:128K")
    assert (done.status, done.json["unread_bytes"], done.json["missing_count"]) == (3, 64 * KIB, 1)
    assert "could not be read" in run("stats", f"emu:{guest}", "--range", f"{BASE:#x}:128K").err


@pytest.mark.parametrize(
    ("words", "status"), [("--range 1:16", 2), ("--slot 9", 2), ("--range 0:4K", 2)]
)
def test_bad_requests(guest: Path, words: str, status: int) -> None:
    assert run("stats", f"emu:{guest}", *words.split()).status == status
