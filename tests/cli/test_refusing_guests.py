"""Guests that refuse as a whole do so in every command, whatever they and the snapshot hold."""

from __future__ import annotations

import ctypes
import subprocess
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mtetool.guest import Memslot
from tests.cli.running import BASE, KIB, ROM, make_guest, run, set_tag, spawn, write

RAM = (Memslot(0, BASE, 512 * KIB),)
# Large enough for memory without tags to be skipped as a hole, without reading.
LARGE = (Memslot(0, BASE, 128 * KIB * KIB),)
ROM_ONLY = (Memslot(0, ROM, 64 * KIB, readonly=True, kind="rom"),)

COMMANDS = {
    "save": ("save", "off", "-o", "new"),
    "save-range": ("save", "off", "-o", "new", "--range", "RANGE"),
    "save-delta": ("save", "off", "-o", "new", "--base", "file"),
    "save-every-page": ("save", "off", "-o", "new", "--every-page"),
    "dump": ("dump", "off"),
    "dump-raw": ("dump", "off", "--output", "raw"),
    "dump-range": ("dump", "off", "--range", "RANGE"),
    "diff-first": ("diff", "off", "on"),
    "diff-second": ("diff", "on", "off"),
    "diff-file": ("diff", "file", "off", "--range", "RANGE"),
    "verify": ("verify", "file", "--against", "off"),
    "verify-delta": ("verify", "delta", "--base", "file", "--against", "off"),
    "dry-run": ("restore", "file", "off", "--dry-run"),
    "restore": ("restore", "file", "off"),
    "restore-delta": ("restore", "delta", "--base", "file", "off"),
}


@pytest.mark.parametrize(
    ("slots", "tagged"), [*product((RAM, LARGE), (False, True)), (ROM_ONLY, False)]
)
def test_mte_off_is_always_said(tmp_path: Path, slots: tuple[Memslot, ...], tagged: bool) -> None:
    on = make_guest(tmp_path / "on", slots=slots)
    off = make_guest(tmp_path / "off", slots=slots, mte=False)
    if tagged:
        write(tmp_path / "on", BASE, np.full(4096, 5, dtype=np.uint8))
    assert run("save", on, "-o", tmp_path / "file").status == 0
    assert run("save", on, "-o", tmp_path / "delta", "--base", tmp_path / "file").status == 0
    places = {"on": on, "off": off, "RANGE": f"{slots[0].ipa:#x}:4K"}
    places |= {name: str(tmp_path / name) for name in ("new", "file", "delta")}
    for name, words in COMMANDS.items():
        outcome = run(*(places.get(word, word) for word in words), "--output", "json")
        if "raw" in words:
            outcome = run(*(places.get(word, word) for word in words))
            assert (name, outcome.status, outcome.raw) == (name, 4, b"")
            continue
        assert (name, outcome.status, outcome.error["error"]) == (name, 4, "mte-off")
        assert not (tmp_path / "new").exists()


def _as_if_not_root() -> None:
    """Take root's power over file permissions away; other users have none anyway."""
    with suppress(OSError):
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.parametrize("tagged", [False, True])
def test_a_dry_run_is_refused_where_nothing_may_be_written(tmp_path: Path, tagged: bool) -> None:
    guest = make_guest(tmp_path / "guest", slots=RAM)
    if tagged:
        set_tag(tmp_path / "guest", BASE, 4096, 5)
    assert run("save", guest, "-o", tmp_path / "file").status == 0
    (tmp_path / "guest").chmod(0o400)
    for more in ([], ["--dry-run"]):
        with spawn(
            "restore", tmp_path / "file", guest, "--json", *more,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_as_if_not_root,
        ) as process:  # fmt: skip
            out, err = process.communicate()
        assert (process.returncode, out) == (4, b"")
        assert b'"error": "permission"' in err
    # A comparison only reads.
    with spawn(
        "verify", tmp_path / "file", "--against", guest, preexec_fn=_as_if_not_root
    ) as process:
        assert process.wait() == 0


@pytest.mark.parametrize("fault", ["EBUSY,on=write", "EBUSY", "EPERM,on=write", "EACCES,on=write"])
def test_a_dry_run_is_refused_where_every_write_would_be(tmp_path: Path, fault: str) -> None:
    """And a fault that fires once is left for the real restore."""
    guest = make_guest(tmp_path / "guest", 1, slots=RAM)
    assert run("save", guest, "-o", tmp_path / "file").status == 0
    assert run("emu", "fault", tmp_path / "guest", "--fault", f"{fault},times=1").status == 0
    for more in (["--dry-run"], ["--dry-run"], []):
        outcome = run("restore", tmp_path / "file", guest, "--json", *more)
        assert outcome.status == 4
        assert outcome.error["error"] == ("busy" if "EBUSY" in fault else "guest")


def test_a_dry_run_is_refused_while_others_use_the_guest(tmp_path: Path) -> None:
    from mtetool.backends import open_guest

    guest = make_guest(tmp_path / "guest", 1, slots=RAM)
    assert run("save", guest, "-o", tmp_path / "file").status == 0
    with open_guest(guest):
        for more in ([], ["--dry-run"]):
            outcome = run("restore", tmp_path / "file", guest, "--json", *more)
            assert (outcome.status, outcome.error["error"]) == (4, "busy")


def test_only_what_is_compared_needs_no_right_to_write(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "guest", 1, slots=ROM_ONLY)
    assert run("save", guest, "-o", tmp_path / "file").status == 0
    assert run("emu", "fault", tmp_path / "guest", "--fault", "EBUSY,on=write").status == 0
    assert run("restore", tmp_path / "file", guest).status == 0
    assert run("restore", tmp_path / "file", guest, "--dry-run").status == 0
