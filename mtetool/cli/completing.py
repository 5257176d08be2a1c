"""Shell completion of guests, snapshots and files; see mtetool(1), COMPLETION.

On each Tab the shell's script calls mtetool with the line so far, and gets one line per answer:
`file,` and `emu,` (the shell itself completes the name of a file, after `emu:`), `begin,kvm:` (more
must follow) or `plain,WORD`. Errors are silent: nobody wants a message in the middle of a command
line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import ClassVar

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class

_KINDS = ("emu:", "kvm:", "libvirt:", "proc:")
# Bounds for hosts with very many processes.
_MOST_PIDS = 20_000
_MOST_FDS = 1_000
_MOST_ANSWERS = 200
# Each named as the shell looks for it.
_SCRIPTS = {"bash": "mtetool.bash", "zsh": "_mtetool", "fish": "mtetool.fish"}
_VM_LINK = "anon_inode:kvm-vm"
# A shell would split other names, or run parts of them.
_PLAIN_NAME = re.compile(r"[\w.+@-]+", re.ASCII)


def files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """File names, which the shell itself completes."""
    return [CompletionItem(incomplete, type="file")]


def emulated(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The file of an emulated guest, with or without `emu:`."""
    return [CompletionItem("", type="emu" if incomplete.startswith("emu:") else "file")]


def guests(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Guests: the kinds, then their files or processes."""
    kind, colon, _ = incomplete.partition(":")
    if not colon:
        return [
            CompletionItem(name, type="begin") for name in _KINDS if name.startswith(incomplete)
        ]
    if kind == "emu":
        return [CompletionItem("", type="emu")]
    if kind in ("kvm", "libvirt", "proc"):
        names = _domains() if kind == "libvirt" else _processes(kind)
        found = (name for name in names if name.startswith(incomplete))
        return [CompletionItem(name) for name in islice(found, _MOST_ANSWERS)]
    return []


def sources(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Guests and snapshots."""
    found = guests(context, parameter, incomplete)
    return found if ":" in incomplete else [*found, CompletionItem("", type="file")]


def _pids() -> list[int]:
    names = (entry.name for entry in Path("/proc").iterdir())
    return sorted(islice((int(name) for name in names if name.isdecimal()), _MOST_PIDS))


def _domains() -> Iterator[str]:
    """Yield `libvirt:NAME` of running domains, by their command lines: libvirt is not asked."""
    from mtetool.vmm import proc, qemu_options

    for pid in _pids():
        domain = qemu_options.domain(proc.command_line(pid))
        if domain and _PLAIN_NAME.fullmatch(domain.name):
            yield f"libvirt:{domain.name}"


def _processes(kind: str) -> Iterator[str]:
    """Yield `kvm:PID` of processes with a VM, or `proc:PID` of this user's, as /proc shows them."""
    for pid in _pids():
        try:
            owned = Path(f"/proc/{pid}").stat().st_uid == os.getuid()
            if _has_vm(pid) if kind == "kvm" else owned:
                yield f"{kind}:{pid}"
        except OSError:
            continue


def _has_vm(pid: int) -> bool:
    fds = islice(Path(f"/proc/{pid}/fd").iterdir(), _MOST_FDS)
    return any(str(fd.readlink()).startswith(_VM_LINK) for fd in fds)


class _Shell(ShellComplete):
    """Any shell: it passes the line up to the cursor, and takes `type,value` lines."""

    file: ClassVar[str]

    def source(self) -> str:
        """Return the shell's script."""
        return (resources.files("mtetool.cli") / "completions" / self.file).read_text()

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one to complete, and what is typed of that one."""
        line = os.environ.get("COMP_LINE", "")
        words = click.shell_completion.split_arg_string(line)
        complete = not words or (line[-1:].isspace() and not line.endswith("\\ "))
        incomplete = "" if complete else words.pop()
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """Return an answer as a line."""
        return f"{item.type},{item.value}"


def register() -> None:
    """Make click use the scripts in `completions/`, which a package can install as they are."""
    for name, file in _SCRIPTS.items():
        add_completion_class(type(f"_{name}", (_Shell,), {"name": name, "file": file}), name)
