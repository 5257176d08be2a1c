"""Partial results are also reported on standard error, in one line: stdout may go nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import BASE, KIB, ROM, make_guest, run, set_tag


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_line_for_what_was_not_done(tmp_path: Path, more: list[str]) -> None:
    guest, target = make_guest(tmp_path / "g", seed=3), make_guest(tmp_path / "t", seed=3)
    whole = tmp_path / "whole"
    assert run("save", guest, "-o", whole, *more).err == ""
    hole = f"EFAULT,on=read,at={BASE + 8 * KIB:#x}:12K"
    assert run("emu", "fault", guest, "--fault", hole).status == 0
    snapshot = tmp_path / "s"
    for words, said in (
        (("save", guest, "-o", snapshot), "12 KiB in 1 range could not be read"),
        (("verify", snapshot), "12 KiB in 1 range are missing in the snapshot"),
        (("verify", whole, "--against", guest), "12 KiB in 1 range could not be read"),
        (("merge", snapshot, "-o", tmp_path / "m"), "12 KiB in 1 range are missing in the result"),
        (("restore", snapshot, target), "12 KiB in 1 range are not in the snapshot"),
        (("restore", whole, guest), "12 KiB in 1 range could not be written or read"),
    ):
        outcome = run(*words, *more)
        assert outcome.status == 3
        assert outcome.err == f"mtetool: warning: partial: the tags of {said}\n"
        assert run("verify", whole, "--against", guest, "--quiet").err == ""


def test_read_only_memory_that_differs(tmp_path: Path) -> None:
    guest, target = make_guest(tmp_path / "g", seed=3), make_guest(tmp_path / "t", seed=3)
    set_tag(tmp_path / "t", ROM, 32, 9)
    assert run("save", guest, "-o", tmp_path / "s").status == 0
    outcome = run("restore", tmp_path / "s", target)
    assert outcome.status == 3
    assert "32 bytes in 1 range differ in read-only memory" in outcome.err


def test_a_guest_that_ends_or_is_busy_half_way(tmp_path: Path) -> None:
    guest, target = make_guest(tmp_path / "g", seed=3), make_guest(tmp_path / "t", seed=4)
    assert run("save", guest, "-o", tmp_path / "s").status == 0
    busy = "EBUSY,on=write,after=70"
    assert run("emu", "fault", target, "--fault", busy).status == 0
    outcome = run("restore", tmp_path / "s", target)
    assert outcome.status == 3
    assert "partial: " in outcome.err
    assert "EBUSY" in outcome.err
    assert run("emu", "fault", guest, "--fault", "vanish,after=70").status == 0
    outcome = run("save", guest, "-o", tmp_path / "p", "--partial", "keep")
    assert outcome.status == 4
    assert "vanished" in outcome.err
    assert outcome.err.count("\n") == 1
