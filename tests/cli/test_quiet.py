"""`--quiet` means the same in every command that has it."""

from __future__ import annotations

import re
from pathlib import Path

import click

from mtetool.cli import group
from tests.cli.running import BASE, KIB, make_guest, run
from tests.test_man import command_at, commands


def test_it_silences_standard_error_and_nothing_else(tmp_path: Path) -> None:
    guest, target = make_guest(tmp_path / "g", seed=3), make_guest(tmp_path / "t", seed=3)
    hole = f"EFAULT,on=read,at={BASE + 8 * KIB:#x}"
    assert run("emu", "fault", guest, "--fault", hole).status == 0
    snapshot = tmp_path / "s"
    for words, status in (
        (("save", guest, "-o", snapshot, "--force"), 3),
        (("verify", snapshot, "--against", guest), 3),
        (("merge", snapshot, "-o", tmp_path / "m", "--force"), 3),
        (("restore", snapshot, target), 3),
        (("dump", guest), 3),
        (("diff", guest, target), 3),
        (("emu", "create", tmp_path / "n", "--force"), 0),
        (("emu", "fill", tmp_path / "n", "zero"), 0),
        (("list",), 0),
    ):
        loud, quiet = run(*words), run(*words, "-q")
        assert (loud.status, quiet.status, quiet.err) == (status, status, ""), words
        assert _timeless(quiet.out) == _timeless(loud.out), words
    assert run("save", guest, "-o", "-", "-q").err == ""
    assert run("verify", snapshot, "-q", "--progress", "json").err == ""
    assert "error" in run("save", "emu:/none", "-o", "-", "-q").err


def _timeless(text: str) -> str:
    return re.sub(r"[0-9.]+ s\b", "", text)


def test_every_command_that_can_warn_has_it_and_explains_it_alike() -> None:
    helps = {
        parameter.help
        for path in commands(group)
        for parameter in command_at(path).params
        if isinstance(parameter, click.Option) and "--quiet" in parameter.opts
    }
    assert helps == {"Nothing on standard error but errors."}
