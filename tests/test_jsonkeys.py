"""The documented JSON keys are those printed; `Outcome.json` also checks every other report."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import mtetool
from mtetool.backends.kvm import listing
from mtetool.backends.kvm.listing import ListedVm, Listing
from mtetool.errors import DETAIL_KEYS, AttachRefusedError, MtetoolError
from mtetool.guest import GuestInfo, Memslot
from tests.cli.running import BASE, KIB, make_guest, run, set_tag, spawn
from tests.jsonkeys import check_keys, documented, paths
from tests.relay.saving import STREAM

_SOURCES = sorted(Path(mtetool.__file__).parent.rglob("*.py"))


def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Reports of all commands, in many states."""
    good, bad, other = tmp_path / "good", tmp_path / "bad", tmp_path / "other"
    guest, broken = make_guest(good, seed=3), make_guest(bad, seed=3)
    target = make_guest(other, seed=4)
    hole = f"EFAULT,on=read,at={BASE + 8 * KIB:#x}"
    first, second, delta, partial = (tmp_path / name for name in ("s", "s2", "d", "p"))
    yield run("emu", "show", good, "--json").json
    yield run("emu", "fault", bad, "--fault", hole, "--json").json
    yield run("emu", "show", bad, "--json").json
    yield run("emu", "create", tmp_path / "new", "--memory", "1M", "--json").json
    fill = ("emu", "fill", tmp_path / "new", "heap", "--json")
    yield run(*fill).json
    yield run(*fill, "--range", f"{BASE:#x}:64K").json
    yield run("emu", "set", tmp_path / "new", f"{BASE:#x}:64=0xf", "--json").json
    yield run("save", guest, "-o", first, "--json").json
    yield run("save", broken, "-o", partial, "--json").json
    set_tag(good, BASE, 64, 9)
    yield run("save", guest, "--freeze", "--base", first, "-o", delta, "--json").json
    yield json.loads(run("save", guest, "-o", "-", "--json").err)
    for file in (first, partial, delta):
        yield run("info", file, "--json").json
        yield run("verify", file, "--json").json
    yield run("info", "-", "--json", stdin=first.read_bytes()).json
    yield run("verify", first, "--against", target, "--json").json
    yield run("verify", first, "--against", broken, "--json").json
    yield run("verify", delta, "--base", first, "--against", guest, "--json").json
    yield run("convert", partial, "--to", "core", "-o", tmp_path / "core", "--json").json
    yield run("merge", first, delta, "-o", second, "--json").json
    yield run("merge", partial, "-o", second, "--force", "--json").json
    for source in (guest, broken, first, partial):
        yield run("dump", source, "--json").json
        yield run("dump", source, "--json", "--granules", "--range", f"{BASE:#x}:4K").json
        yield run("diff", source, target, "--json").json
        yield run("diff", source, guest, "--json").json
        yield run("diff", source, target, "--stat", "--json").json
        yield run("diff", source, target, "--brief", "--json").json
        yield run("stats", source, "--json").json
        yield run("dump", source, "--at", f"{BASE:#x}", "--at", "0x1000", "--json").json
    yield run("verify", first, partial, "--json").json
    yield run("info", first, tmp_path / "none", "--json").json
    yield run("merge", partial, "--fill", first, "-o", second, "--force", "--json").json
    yield run("restore", first, target, "--dry-run", "--json").json
    yield run("restore", partial, target, "--json").json
    yield run("restore", first, target, "--json").json
    assert run("emu", "fault", other, "--fault", hole.replace("read", "write")).status == 0
    yield run("restore", delta, target, "--base", first, "--json").json
    yield run("probe", "--json").json
    yield run("probe", "--selftest", "--json").json
    off = make_guest(tmp_path / "off", mte=False, vcpus=0)
    yield run("enable", off, "--json").json
    yield run("enable", off, "--json").json
    info = GuestInfo("kvm:1:2", True, 4096, (Memslot(0, BASE, 4096),), "vmm", None, 1, 1)
    listed = ListedVm(info, 2, "paused", "root", None)
    refusing = ListedVm(info, 2, None, None, AttachRefusedError("no"))
    found = Listing((listed, refusing), ())
    monkeypatch.setattr(listing, "list_vms", lambda attach, connect: found)
    yield run("list", "--json", "--quiet").json
    for line in run("verify", first, "--progress", "json", "--json").err.splitlines():
        yield json.loads(line)
    with spawn("relay", "save", guest, "--json", stdin=-1, stdout=-1, stderr=-1) as saving:
        _, said = saving.communicate(STREAM)
        yield json.loads(said.splitlines()[-1])
    yield from failures(tmp_path, first)


def failures(tmp_path: Path, snapshot: Path) -> Iterator[Any]:
    """Errors of many kinds."""
    guest = make_guest(tmp_path / "slow", seed=3)
    assert run("emu", "fault", tmp_path / "slow", "--fault", "vanish,after=20").status == 0
    (tmp_path / "cut").write_bytes(snapshot.read_bytes()[:500])
    yield run("save", guest, "-o", tmp_path / "x", "--json").error
    yield run("restore", snapshot, guest, "--json").error
    yield run("info", tmp_path / "cut", "--json").error
    yield run("info", tmp_path / "none", "--json").error
    yield run("info", tmp_path, "--json").error
    yield run("save", "kvm:0", "-o", "-", "--json").error
    yield run("no-such-command", "--json").error


def test_reports_have_the_keys_that_stand_in_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    for document in reports(tmp_path, monkeypatch):
        check_keys(document)
        seen.setdefault(document["schema"], set()).update(paths(document))
    never = {
        f"{schema} {key} (man/{page})"
        for schema, (page, keys) in documented().items()
        for key in keys - seen.get(schema, set())
        # Not rows of lists that were always empty here: other tests have them.
        if "[]" not in key
    }
    assert never == set(), "documented, but never seen: remove it, or extend `reports`"


def test_error_keys_are_those_that_are_documented() -> None:
    page, keys = documented()["mtetool.error/1"]
    where = f"man/{page}, .SS mtetool.error/1, and DETAIL_KEYS in mtetool/errors.py"
    fixed = {"schema", "error", "message", "hint", "status"}
    assert {key for key in keys if "." not in key} == fixed | set(DETAIL_KEYS), where
    used = {key for path in _SOURCES for key in _details(ast.parse(path.read_text()))}
    assert used - set(DETAIL_KEYS) == set(), f"keys of errors that are missing in {where}"


def _details(tree: ast.AST) -> Iterator[str]:
    """The keys of the details that a module gives to errors."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        names = [keyword.arg for keyword in node.keywords if keyword.arg not in (None, "hint")]
        if name.endswith("Error") or name in ("host_error", "update"):
            if name != "update" or ast.unparse(node.func).endswith(".details.update"):
                yield from (word for word in names if word is not None)
        elif ast.unparse(node.func).endswith(".details.setdefault"):
            yield ast.literal_eval(node.args[0])


def all_errors(kind: type[MtetoolError] = MtetoolError) -> Iterator[type[MtetoolError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from all_errors(inner)


def test_every_error_id_stands_below_its_status() -> None:
    text = (Path(__file__).parent.parent / "man" / "mtetool.1").read_text().replace("\\-", "-")
    section = re.split(r"^\.SH ", text.partition(".SH ERRORS\n")[2], flags=re.MULTILINE)[0]
    parts = re.split(r"^\.SS Status ([0-9]+)\n", section, flags=re.MULTILINE)[1:]
    there = {
        (int(status), found)
        for status, part in zip(parts[::2], parts[1::2], strict=True)
        for found in re.findall(r"^\.TP\n\.B ([a-z0-9-]+)$", part, flags=re.MULTILINE)
    }
    for module in pkgutil.walk_packages(mtetool.__path__, "mtetool."):
        import_module(module.name)
    classes = [kind for kind in all_errors() if kind.__module__.startswith("mtetool")]
    known = {(kind.status, kind.id) for kind in classes}
    assert known - there == set(), "write .TP, .B ID and a sentence into ERRORS of man/mtetool.1"
    assert there - known == set(), "no error has these ids"
