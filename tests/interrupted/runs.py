"""The runs that are interrupted: what they find, and what must hold afterwards."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtetool.guest import Memslot
from tests.cli.running import BASE, make_guest, run, same_tags, set_tag

MIB = 1 << 20
SLOTS = (Memslot(0, BASE, 4 * MIB), Memslot(1, BASE + 8 * MIB, MIB))
# One block of the guest's file holds the tags of this much guest memory.
_BLOCK_BYTES = 4096 * 16
_CREATED = ("--memory", "1M", "--fill", "heap")


@dataclass(frozen=True)
class After:
    """A directory after a run: the run's status (negative: the signal), and what it printed."""

    directory: Path
    status: int
    err: str
    out: bytes

    def __truediv__(self, name: str) -> Path:
        return self.directory / name


Judge = Callable[[After, After], str]
"""What is wrong ("" for nothing) after a run, given that run and one without interruption."""


@dataclass(frozen=True)
class Run:
    """A command line to interrupt; `status` is its status if nothing interrupts it.

    `makes` is the file that it makes or replaces.
    """

    name: str
    arguments: tuple[str, ...]
    judge: Judge
    status: int = 0
    stdin: str = "/dev/null"
    named: bool = False
    makes: str = ""


def make_template(directory: Path) -> None:
    """Make the files that each run finds."""
    directory.mkdir()
    make_guest(directory / "g", 3, slots=SLOTS)
    shutil.copy(directory / "g", directory / "t")
    for first in range(BASE, SLOTS[0].end, 8 * _BLOCK_BYTES):
        set_tag(directory / "t", first, _BLOCK_BYTES, 9)
    set_tag(directory / "t", SLOTS[1].ipa, 3 * _BLOCK_BYTES, 9)
    shutil.copy(directory / "t", directory / "was")
    make_guest(directory / "off", slots=SLOTS, mte=False, vcpus=0)
    assert run("save", f"emu:{directory / 'g'}", "-o", directory / "s").status == 0
    assert run("save", f"emu:{directory / 't'}", "-o", directory / "old").status == 0
    assert run("emu", "create", directory / "expected", *_CREATED).status == 0


def holds(snapshot: Path, guest: Path) -> bool:
    """Whether a snapshot is whole and has a guest's tags."""
    return run("verify", snapshot, "--against", f"emu:{guest}").status == 0


def _saved(after: After, _: After) -> str:
    path = after / "new"
    if path.exists() and not holds(path, after / "g"):
        return "a file that is not whole"
    if not after.status and not path.exists():
        return "status 0 and no file"
    return _saved_again(after, path)


def _saved_again(after: After, path: Path) -> str:
    again = run("save", f"emu:{after / 'g'}", "-o", path, "--force")
    return "" if not again.status and holds(path, after / "g") else f"again: {again.err}"


def _replaced(after: After, _: After) -> str:
    path = after / "old"
    if holds(path, after / "t"):
        if not after.status:
            return "status 0 and the old file"
    elif not holds(path, after / "g"):
        return "neither the old file nor a new one that is whole"
    return _saved_again(after, path)


def _kept(after: After, _: After) -> str:
    return "" if after.status and holds(after / "old", after / "t") else "the old file is lost"


def _streamed(after: After, _: After) -> str:
    (after / "stream").write_bytes(after.out)
    whole = holds(after / "stream", after / "g")
    (after / "stream").unlink()
    return "" if after.status or whole else "status 0 and a stream that is not whole"


def _restored(after: After, _: After) -> str:
    if not after.status and not same_tags(after / "t", after / "g", SLOTS):
        return "status 0 and other tags"
    again = run("restore", after / "s", f"emu:{after / 't'}")
    if again.status:
        return f"again: {again.err}"
    same = run("diff", after / "s", f"emu:{after / 't'}").status == 0
    return "" if same and same_tags(after / "t", after / "g", SLOTS) else "again: not the same"


def _created(after: After, _: After) -> str:
    path = after / "made"
    wrong = _whole_or_not(after, path)
    again = run("emu", "create", path, *_CREATED, "--force")
    return wrong or (f"again: {again.err}" if again.status else "")


def _whole_or_not(after: After, path: Path) -> str:
    if path.exists():
        return "" if _same_bytes(path, after / "expected") else "a guest that is not whole"
    return "" if after.status else "status 0 and no guest"


def _recreated(after: After, _: After) -> str:
    wrong = _old_or_new(after)
    again = run("emu", "create", after / "t", *_CREATED, "--force")
    return wrong or (f"again: {again.err}" if again.status else "")


def _old_or_new(after: After) -> str:
    if _same_bytes(after / "t", after / "was"):
        return "" if after.status else "status 0 and the old guest"
    return "" if _same_bytes(after / "t", after / "expected") else "a guest that is not whole"


def _same_bytes(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def _filled(after: After, whole: After) -> str:
    shown = run("emu", "show", after / "t")
    if shown.status:
        return f"no guest any more: {shown.err}"
    if not after.status and not _same_bytes(after / "t", whole / "t"):
        return "status 0 and other tags"
    again = run("emu", "fill", after / "t", "heap")
    return f"again: {again.err}" if again.status else ""


def _enabled(after: After, _: After) -> str:
    shown = run("emu", "show", after / "off", "--json")
    if shown.status:
        return f"no guest any more: {shown.err}"
    if not after.status and not shown.json["mte"]:
        return "status 0 and MTE is off"
    again = run("enable", f"emu:{after / 'off'}")
    return f"again: {again.err}" if again.status else ""


def _told(after: After, whole: After) -> str:
    """A command that reports: it printed all of it, or its status is not that of an answer."""
    if after.status != whole.status or _timeless(after.out) == _timeless(whole.out):
        return ""
    return f"status {after.status} and another answer"


def _timeless(out: bytes) -> bytes:
    return re.sub(rb"[0-9.]+ s\b", b"", out)


# One thread that compresses: with more, how many exist at a time is chance.
_SAVE = ("save", "emu:g", "--jobs", "1", "-o")
_OVER = (*_SAVE, "old", "--force")
_CREATE_OVER = ("emu", "create", "t", *_CREATED, "--force")

RUNS = (
    Run("save", (*_SAVE, "new"), _saved, makes="new"),
    Run("save-named", (*_SAVE, "new"), _saved, named=True, makes="new"),
    Run("save-over", _OVER, _replaced, makes="old"),
    Run("save-over-named", _OVER, _replaced, named=True, makes="old"),
    Run("save-exists", (*_SAVE, "old"), _kept, status=2),
    Run("save-stream", (*_SAVE, "-"), _streamed),
    Run("restore", ("restore", "s", "emu:t"), _restored),
    Run("restore-pipe", ("restore", "-", "emu:t"), _restored, stdin="|s"),
    Run("enable", ("enable", "emu:off"), _enabled),
    Run("create", ("emu", "create", "made", *_CREATED), _created, makes="made"),
    Run("create-over", _CREATE_OVER, _recreated, makes="t"),
    Run("create-over-named", _CREATE_OVER, _recreated, named=True, makes="t"),
    Run("fill", ("emu", "fill", "t", "heap"), _filled),
    Run("info", ("info", "s"), _told),
    Run("info-pipe", ("info", "-"), _told, stdin="|s"),
    Run("verify", ("verify", "s", "--against", "emu:g"), _told),
    Run("dump", ("dump", "emu:g"), _told),
    Run("dump-raw", ("dump", "s", "--output", "raw"), _told),
    Run("diff", ("diff", "s", "emu:t"), _told, status=1),
    Run("diff-pipe", ("diff", "-", "emu:g"), _told, stdin="|s"),
)
