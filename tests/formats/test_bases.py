"""Deltas with their bases, converted and in a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import BASE, make_guest, run


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    guest = make_guest(tmp_path / "guest", seed=3)
    assert run("save", guest, "-o", tmp_path / "base").status == 0
    assert run("emu", "set", tmp_path / "guest", f"{BASE:#x}:64K=5").status == 0
    delta = ("save", guest, "--base", tmp_path / "base", "-o", tmp_path / "delta")
    assert run(*delta).status == 0
    assert run("save", guest, "-o", tmp_path / "whole").status == 0
    return tmp_path


def test_a_delta_is_converted_with_its_base(saved: Path) -> None:
    words = ("--base", saved / "base", "-o", saved / "new")
    assert run("convert", saved / "delta", *words).status == 0
    assert run("diff", saved / "whole", saved / "new").status == 0
    raw = ("--to", "raw", "--base", saved / "base", "-o", saved / "raw")
    assert run("convert", saved / "delta", *raw).status == 0
    assert (saved / "raw").read_bytes() == run("dump", saved / "whole", "--output", "raw").raw
    standard = ("-", "--from", "mtesnap", "--base", saved / "base")
    piped = run("convert", *standard, stdin=(saved / "delta").read_bytes())
    assert piped.status == 0, piped.err
    (saved / "piped").write_bytes(piped.raw)
    assert run("diff", saved / "whole", saved / "piped").status == 0


def test_several_of_which_one_is_a_delta(saved: Path) -> None:
    pytest.importorskip("pyarrow")
    words = ("--to", "parquet", "--base", saved / "base", "-o", f"{saved}/tables/")
    assert run("convert", saved / "delta", saved / "whole", *words).status == 0


def test_a_base_is_needed_and_only_for_a_delta(saved: Path) -> None:
    without = run("convert", saved / "delta", "-o", saved / "new", "--json")
    assert (without.status, without.error["error"]) == (2, "base-needed")
    words = ("--base", saved / "base", "-o", saved / "new", "--json")
    assert run("convert", saved / "whole", *words).error["error"] == "usage"
    bare = run("convert", saved / "whole", "--from", "raw", "--memslot", "0:64K", *words)
    assert (bare.status, bare.error["error"]) == (2, "usage")
    guest = run("convert", f"emu:{saved}/guest", "--to", "raw", *words)
    assert (guest.status, guest.error["error"]) == (2, "usage")
    assert not (saved / "new").exists()


def test_a_report_of_deltas(saved: Path) -> None:
    page = ("report", saved / "delta", "--base", saved / "base", "-o", saved / "a.html")
    assert run(*page).status == 0
    against = ("--against", saved / "whole", "--base", saved / "base", "-o", saved / "b.html")
    assert run("report", saved / "delta", *against).status == 0
    needed = run("report", saved / "delta", "-o", saved / "c.html")
    assert needed.status == 2
