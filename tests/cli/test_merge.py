"""Deltas on the command line: save --base, restore and verify with --base, merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import run

BASE = 0x4000_0000


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A guest, a copy of its first state, a base, and two deltas up to its last state."""
    guest, copy = (f"emu:{tmp_path / name}" for name in ("guest", "copy"))
    base, first, second = (str(tmp_path / name) for name in ("base", "first", "second"))
    for name in ("guest", "copy"):
        run("emu", "create", tmp_path / name, "--memory", "64M", "--fill", "heap", "--seed", "3")
    assert run("save", guest, "-o", base).status == 0
    run("emu", "set", tmp_path / "guest", f"{BASE + 0x5000}:64=7")
    assert run("save", guest, "--base", base, "-o", first).status == 0
    run("emu", "fill", tmp_path / "guest", "random", "--range", f"{BASE + 0x100000}:8K")
    done = run("save", guest, "--base", base, "--base", first, "-o", second, "--json")
    assert done.status == 0
    assert done.json["base_id"] == run("info", first, "--json").json["snapshot_id"]
    return {"guest": guest, "copy": copy, "base": base, "first": first, "second": second}


def test_deltas_are_small_and_restore_all(files: dict[str, str]) -> None:
    sizes = [Path(files[name]).stat().st_size for name in ("base", "first", "second")]
    assert sizes[1] < 2000
    assert sizes[2] < 3000
    assert sizes[0] > 20 * sizes[2]
    bases = ("--base", files["base"], "--base", files["first"])
    assert run("verify", files["second"], *bases, "--against", files["copy"]).status == 1
    assert run("restore", files["second"], files["copy"], *bases).status == 0
    assert run("diff", files["guest"], files["copy"]).status == 0
    assert run("verify", files["second"], *bases, "--against", files["copy"]).status == 0


def test_merging(files: dict[str, str], tmp_path: Path) -> None:
    whole, both = str(tmp_path / "whole"), str(tmp_path / "both")
    done = run("merge", files["base"], files["first"], files["second"], "-o", whole, "--json")
    assert (done.status, done.json["base_id"]) == (0, None)
    assert done.json["snapshot_id"] == run("info", files["second"], "--json").json["snapshot_id"]
    assert run("diff", whole, files["guest"]).status == 0
    assert run("merge", files["first"], files["second"], "-o", both).status == 0
    assert "delta to" in run("merge", files["first"], files["second"], "-o", both, "--force").out
    assert run("verify", both).status == 0
    assert run("verify", both, "--base", files["base"], "--against", files["guest"]).status == 0
    assert run("merge", files["base"], both, "-o", whole).status == 2  # it exists
    # The result can replace a file that is merged.
    assert run("merge", files["base"], both, "-o", files["base"], "--force").status == 0
    assert run("diff", files["base"], files["guest"]).status == 0


@pytest.mark.parametrize(
    "words", ["restore first copy", "verify first --against copy", "dump first"]
)
def test_a_delta_without_its_base(files: dict[str, str], words: str) -> None:
    done = run(*(files.get(word, word) for word in words.split()), "--json")
    assert (done.status, done.error["error"]) == (2, "base-needed")
    assert "merge" in done.error["hint"]


def test_snapshots_in_the_wrong_order(files: dict[str, str], tmp_path: Path) -> None:
    done = run("merge", files["first"], files["base"], "-o", tmp_path / "x", "--json")
    assert (done.status, done.error["error"]) == (2, "usage")
    done = run("merge", files["base"], files["second"], "-o", tmp_path / "x", "--json")
    assert (done.status, done.error["error"]) == (2, "base-needed")
    done = run("save", files["guest"], "--base", files["first"], "-o", tmp_path / "x", "--json")
    assert (done.status, done.error["error"]) == (2, "base-needed")
    assert not (tmp_path / "x").exists()


def test_a_damaged_base(files: dict[str, str], tmp_path: Path) -> None:
    data = bytearray(Path(files["base"]).read_bytes())
    data[len(data) // 2] ^= 1
    Path(files["base"]).write_bytes(data)
    bases = ("--base", files["base"])
    before = Path(files["copy"].removeprefix("emu:")).read_bytes()
    assert run("restore", files["first"], files["copy"], *bases).status == 5
    assert run("save", files["guest"], *bases, "-o", tmp_path / "x").status == 5
    assert run("merge", files["base"], files["first"], "-o", tmp_path / "x").status == 5
    assert not (tmp_path / "x").exists()
    assert Path(files["copy"].removeprefix("emu:")).read_bytes() == before


def test_gaps_are_filled_from_another(tmp_path: Path) -> None:
    guest = f"emu:{tmp_path / 'g'}"
    partial, later, other, whole = (str(tmp_path / name) for name in ("p", "l", "o", "w"))
    run("emu", "create", tmp_path / "g", "--memory", "1M", "--fill", "heap", "--seed", "3")
    for n, (path, at) in enumerate(((partial, 0x2000), (later, 0x8000))):
        faults = [f"--fault=EFAULT,on=read,at={BASE + at + extra:#x}" for extra in (0, 0x10000)]
        assert run("emu", "fault", tmp_path / "g", *faults[: 2 - n]).status == 0
        assert run("save", guest, "-o", path).status == 3
        assert run("emu", "fault", tmp_path / "g", "--clear").status == 0
    # Changed after the first save: only what that lacks is taken from the second.
    run("emu", "set", tmp_path / "g", f"{BASE:#x}:64=7")
    assert run("save", guest, "-o", other).status == 0
    done = run("merge", partial, "--fill", later, "-o", whole, "--json")
    assert (done.status, done.json["filled_bytes"], done.json["missing"]) == (0, 8192, [])
    differing = run("diff", whole, guest, "--json").json["ranges"]
    assert {row["ipa"] // 4096 for row in differing} == {BASE // 4096}
    info = run("info", whole, "--json").json
    assert info["consistent"] is False
    assert info["snapshot_id"] not in {
        run("info", path, "--json").json["snapshot_id"] for path in (partial, later)
    }
    assert run("verify", whole).status == 0
    # The first of several that has the tags; what none has stays missing.
    gap = f"{BASE + 0x8000:#x}"
    done = run("merge", later, "--fill", later, "-o", whole, "--force", "--json")
    assert (done.status, [hex(row["ipa"]) for row in done.json["missing"]]) == (3, [gap])
    done = run("merge", later, "--fill", later, "--fill", other, "-o", whole, "--force", "--json")
    assert (done.status, done.json["filled_bytes"]) == (0, 4096)


def test_a_fill_of_other_memory_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    run("emu", "create", tmp_path / "other", "--memory", "1M")
    assert run("save", f"emu:{tmp_path / 'other'}", "-o", tmp_path / "o").status == 0
    done = run("merge", files["base"], "--fill", tmp_path / "o", "-o", tmp_path / "w", "--json")
    assert (done.status, done.error["error"]) == (4, "layout")
    done = run("merge", files["base"], "--fill", files["first"], "-o", tmp_path / "w", "--json")
    assert (done.status, done.error["error"]) == (2, "base-needed")
    assert not (tmp_path / "w").exists()
