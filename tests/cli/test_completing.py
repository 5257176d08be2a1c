"""Tab completion, in the shells themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mtetool.cli import completing, group
from tests.cli.test_bar import read_until, terminal
from tests.test_man import command_at, commands
from tests.vmm.domains import pretender
from tests.vmm.fake_libvirt import OTHER_UUID

# The line as typed up to Tab, and the line that Tab must make of it.
CASES = [
    ("mtetool info {here}/gu", "mtetool info {here}/guest.emu"),
    ("mtetool save emu:{here}/gu", "mtetool save emu:{here}/guest.emu"),
    ("mtetool save emu:{here}/sub/", "mtetool save emu:{here}/sub/inner.emu"),
    ("mtetool save k", "mtetool save kvm:"),
    ("mtetool dump proc:{pid_start}", "mtetool dump proc:{pid}"),
    ("mtetool save li", "mtetool save libvirt:"),
    ("mtetool save libvirt:compl", "mtetool save libvirt:completed-vm.1"),
    ("mtetool save --base={here}/gu", "mtetool save --base={here}/guest.emu"),
    ("mtetool resto", "mtetool restore"),
    ("mtetool save --every", "mtetool save --every-page"),
    ("true | mtetool info {here}/gu", "mtetool info {here}/guest.emu"),
]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    (tmp_path / "sub").mkdir()
    for name in ("guest.emu", "sub/inner.emu"):
        (tmp_path / name).touch()
    # This Python's `mtetool`, even if it is not installed as a command.
    program = tmp_path / "bin" / "mtetool"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mtetool "$@"\n')
    program.chmod(0o755)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    pid = str(os.getpid())
    with pretender(name="completed-vm.1"):
        yield {"here": str(tmp_path), "pid": pid, "pid_start": pid}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes(shell: str, names: dict[str, str]) -> None:
    start = {
        "bash": (["bash", "--norc", "--noprofile", "-i"], "bind 'set enable-bracketed-paste off'"),
        "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u; PS1='$ '"),
    }
    words, setup = start[shell]
    with terminal(words, 1000) as fd:
        read_until(fd, rb"[$%#] ")
        source = f'eval "$(_MTETOOL_COMPLETE={shell}_source mtetool)"'
        # A function takes mtetool's place, and shows the words of the line.
        shows = """mtetool() { printf '<%s>' mtetool "$@"; echo; }; echo rea""dy"""
        os.write(fd, f"{setup}; {source}; {shows}\n".encode())
        read_until(fd, rb"(?s)ready\r?\n.*\$ ")
        for typed, wanted in CASES:
            line, end = typed.format(**names), wanted.format(**names)
            os.write(fd, f"{line}\t\n".encode())
            seen = read_until(fd, rb"(?s)<mtetool>[^\n]*>\r?\n.*\$ ").decode()
            shown = re.findall(r"<([^<>]*)>", seen[seen.index("<mtetool>") :])
            assert shown == end.split(), (line, seen)
        os.write(fd, b"exit\n")


def test_fish_completes(names: dict[str, str]) -> None:
    for typed, wanted in CASES:
        line, end = typed.format(**names), wanted.format(**names)
        script = '_MTETOOL_COMPLETE=fish_source mtetool | source; complete -C "$argv"'
        done = subprocess.run(
            ["fish", "--no-config", "-c", script, line], capture_output=True, text=True, check=True
        )
        answers = [answer.partition("\t")[0] for answer in done.stdout.splitlines()]
        assert end.split()[-1] in answers, (line, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "line", ["", "mtetool ", "mtetool nix ", "mtetool save kvm:x", "mtetool 'a"]
)
def test_no_line_makes_a_message(names: dict[str, str], line: str) -> None:
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run(
            ["mtetool"],
            env={**os.environ, "COMP_LINE": line, "_MTETOOL_COMPLETE": f"{shell}_complete"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""


def test_every_name_of_a_guest_or_file_is_completed() -> None:
    missing = [
        (*path, parameter.name)
        for path in commands(group)
        for parameter in command_at(path).params
        if {"GUEST", "SOURCE", "FILE", "A", "B", "SOCKET", "PATH", "BASE [DELTA]..."}
        & {parameter.make_metavar(click.Context(command_at(path)))}
        and parameter._custom_shell_complete is None
    ]
    assert missing == []


def test_names_that_a_shell_would_run_are_not_completed() -> None:
    context = click.Context(click.Command("save"))
    parameter = click.Argument(["guest"])
    odd = f"odd{os.getpid()}"
    with pretender(name=f"{odd}-$(x)"), pretender(OTHER_UUID, f"{odd}-plain"):
        found = completing.guests(context, parameter, f"libvirt:{odd}")
    assert [item.value for item in found] == [f"libvirt:{odd}-plain"]
