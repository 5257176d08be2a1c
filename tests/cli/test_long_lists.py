"""JSON reports list all ranges, however many; text says how many more there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtetool.guest import Memslot
from tests.cli.running import BASE, KIB, make_guest, run, write

RAM = (Memslot(0, BASE, 256 * KIB),)
N_RANGES = 256 * KIB // 32


def test_every_other_granule_differs(tmp_path: Path) -> None:
    saved = make_guest(tmp_path / "saved", slots=RAM)
    assert run("save", saved, "-o", tmp_path / "file").status == 0
    guest = make_guest(tmp_path / "guest", slots=RAM)
    write(tmp_path / "guest", BASE, np.tile(np.array([3, 0], dtype=np.uint8), N_RANGES))
    expected = [{"ipa": BASE + n * 32, "size_bytes": 16} for n in range(N_RANGES)]
    for words, name in (
        (("verify", tmp_path / "file", "--against", guest), "differing"),
        (("restore", tmp_path / "file", guest, "--dry-run"), "changes"),
    ):
        found = run(*words, "--json").json
        assert (found[f"{name}_count"], found[name]) == (N_RANGES, expected)
        text = run(*words).out
        assert f"… and {N_RANGES - 20} more (--output json lists all)" in text
        assert f"{BASE + 19 * 32:#x}:0x10" in text
        assert f"{BASE + 20 * 32:#x}:0x10" not in text


def test_pages_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    """A fault hits half of them."""
    n_pages = 8800
    slots = (Memslot(0, BASE, n_pages * 4 * KIB),)
    good = make_guest(tmp_path / "good", slots=slots)
    write(tmp_path / "good", BASE, np.full(n_pages * 256, 3, dtype=np.uint8))
    assert run("save", good, "-o", tmp_path / "file").status == 0
    guest = make_guest(tmp_path / "guest", slots=slots)
    fault = ("--fault", "EFAULT,chance=0.5,seed=5")
    assert run("emu", "fault", tmp_path / "guest", *fault).status == 0
    outcome = run("save", guest, "-o", tmp_path / "partial", "--json")
    assert (outcome.status, len(outcome.json["missing"])) == (3, outcome.json["missing_count"])
    info = run("info", tmp_path / "partial", "--json").json
    assert info["missing"] == outcome.json["missing"]
    assert info["missing_count"] > 1000
    restored = run("restore", tmp_path / "file", guest, "--json", "--no-verify")
    assert (restored.status, len(restored.json["refused"])) == (3, restored.json["refused_count"])
