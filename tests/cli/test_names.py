"""Names of files and guests are foreign text: output escapes them, and they stay on their line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.running import BASE, KIB, make_guest, run, set_tag

# A fake row, an escape sequence, and a byte that is not UTF-8.
NAME = os.fsdecode(b"a\n0x0  0x10  f\x1b[2J\xff")
SHOWN = r"a\n0x0  0x10  f\x1b[2J\xff"


@pytest.fixture
def guest(tmp_path: Path) -> str:
    return make_guest(tmp_path / NAME, seed=3)


def test_every_report_and_error_escapes_names(guest: str, tmp_path: Path) -> None:
    snapshot, missing = tmp_path / (NAME + ".s"), tmp_path / (NAME + "none")
    hole = f"EFAULT,on=read,at={BASE + 8 * KIB:#x}"
    other = make_guest(tmp_path / "other", seed=4)
    off = make_guest(tmp_path / (NAME + ".off"), mte=False, vcpus=0)
    set_tag(tmp_path / "other", 0x1000_0000, 64 * KIB, 3)
    for words in (
        ("emu", "show", guest),
        ("emu", "fault", guest, "--fault", hole),
        ("save", guest, "-o", snapshot),
        ("save", guest, "-o", snapshot),  # it exists
        ("save", guest, "-o", "-"),
        ("info", snapshot),
        ("verify", snapshot),
        ("verify", snapshot, "--against", guest),
        ("merge", snapshot, "-o", tmp_path / (NAME + ".m")),
        ("diff", snapshot, guest),
        ("dump", snapshot, "--range", "0:4K"),
        ("restore", snapshot, other),
        ("restore", snapshot, guest, "--dry-run"),
        ("enable", off),
        ("info", missing),
        ("emu", "show", missing),
        ("dump", NAME + ":x"),
        ("save", NAME),
        ("emu", "set", guest, NAME),
        ("emu", "create", tmp_path / "n", "--fault", NAME),
        ("save", guest, "--range", NAME),
        (NAME,),
        ("save", guest, "--" + NAME),
    ):
        done = run(*words)
        text = done.raw.decode(errors="replace") if "-" not in words else ""
        for line in (text + done.err).splitlines():
            assert not line.startswith("0x0  0x10"), (words, text, done.err)
        assert "\x1b" not in text + done.err, (words, text, done.err)
        assert "udcff" not in text + done.err, (words, text, done.err)
    assert SHOWN in run("info", snapshot).out
    assert SHOWN in run("info", missing).err


def test_names_in_json_are_the_names_themselves(guest: str, tmp_path: Path) -> None:
    shown = run("emu", "show", guest, "--json")
    assert shown.raw.isascii()
    assert os.fsencode(shown.json["source"]) == os.fsencode(guest)
    error = run("info", tmp_path / (NAME + "none"), "--json").err
    assert error.count("\n") == 1
    assert os.fsencode(NAME) in os.fsencode(json.loads(error)["message"])


def test_jq_reads_it(guest: str) -> None:
    report = run("emu", "show", guest, "--json").raw
    done = subprocess.run(["jq", "-r", ".source"], input=report, capture_output=True, check=True)
    # jq shows U+FFFD for what is not a character.
    assert done.stdout.decode().startswith(guest.partition("\udcff")[0])
