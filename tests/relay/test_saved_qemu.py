"""A real QEMU saves itself through `relay save`, and another comes back through `relay load`.

Its vCPUs are emulated, and the tags are those of an emulated guest beside it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtetool.guest import Memslot
from mtetool.relay.saved import MAGIC
from tests.cli.running import command, make_guest, run, same_tags
from tests.relay.qemu import SUITES, Qemu, qemu

_SLOT = Memslot(0, 0x4000_0000, 64 << 20)
_PLAIN = ("-M", "virt", "-cpu", "max", "-m", "64M")
_SECONDS = 60.0
_TREE = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Qemu]:
    (tmp_path / "1").mkdir()
    make_guest(tmp_path / "source", 5, slots=(_SLOT,))
    with qemu(tmp_path / "1", "sid", *_PLAIN) as vmm:
        yield vmm


def _exec(*words: str | Path, then: str) -> str:
    env = f"cd {shlex.quote(str(_TREE))};"
    return f"exec:{env} {shlex.join(command('relay', *words))} {then}"


def _ended(vmm: Qemu) -> str:
    deadline = time.monotonic() + _SECONDS
    status = ""
    while status not in ("completed", "failed"):
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
        status = vmm.ask("query-migrate").get("status", "")
    return status


def test_qemu_comes_back_with_its_tags(tmp_path: Path, source: Qemu) -> None:
    file, log = tmp_path / "file", tmp_path / "log"
    then = f">{file} 2>{log}"
    source.ask("migrate", uri=_exec("save", f"emu:{tmp_path / 'source'}", then=then))
    assert _ended(source) == "completed", log.read_text()
    assert file.stat().st_size < 4 << 20
    make_guest(tmp_path / "target", slots=(_SLOT,))
    load = _exec("load", f"emu:{tmp_path / 'target'}", then=f"<{file} 2>{log}")
    (tmp_path / "2").mkdir()
    with qemu(tmp_path / "2", "sid", *_PLAIN, "-incoming", load) as target:
        assert _ended(target) == "completed", log.read_text()
        assert target.ask("query-status")["status"] == "prelaunch"  # as the source was
    assert same_tags(tmp_path / "source", tmp_path / "target", (_SLOT,))
    # Damaged, it starts no guest, although QEMU has all memory by then.
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    (tmp_path / "3").mkdir()
    with qemu(tmp_path / "3", "sid", *_PLAIN, "-incoming", "defer") as target:
        target.ask("migrate-incoming", uri=load, **{"exit-on-error": False})
        assert _ended(target) == "failed"
        assert target.ask("query-status")["status"] == "inmigrate"
    assert "standard input is damaged" in log.read_text()


@pytest.mark.parametrize("suite", SUITES)
def test_file_that_cannot_be_read_at_all_fails_the_migration(suite: str, tmp_path: Path) -> None:
    """A QEMU that gets nothing at all would wait without end."""
    file, log, gzip = (tmp_path / name for name in ("file", "log", "gzip"))
    gzip.write_text(run("relay", "filter", "--show", "program").out)
    gzip.chmod(0o755)
    there = make_guest(tmp_path / "target", slots=(_SLOT,))
    then = f"<{file} 2>{log}"
    filtering = _exec("filter", "--", gzip, "-dc", then=then)
    for number, (data, uri, said) in enumerate((
        (MAGIC, _exec("load", there, then=then), "ends at byte 8"),
        (b"none of ours", _exec("load", there, then=then), "is not a file that mtetool"),
        (MAGIC + bytes(8), _exec("load", there, then=then), "has version 0"),
        (b"", _exec("load", "proc:1", then=then), "not a guest that QEMU migrates"),
        (b"none of ours", filtering, "not in gzip format"),
        (MAGIC + bytes(8), filtering, "has version 0"),
    )):  # fmt: skip
        file.write_bytes(data)
        directory = tmp_path / str(number)
        directory.mkdir()
        with qemu(directory, suite, *_PLAIN, "-incoming", "defer") as target:
            target.ask("migrate-incoming", uri=uri, **{"exit-on-error": False})
            assert _ended(target) == "failed"
            assert target.ask("query-status")["status"] == "inmigrate"
        assert said in log.read_text()
        assert file.read_bytes() == data


@pytest.mark.parametrize("then", [">/dev/full", "| head -c 100000 >/dev/null"])
def test_output_that_takes_no_more_fails_the_migration(source: Qemu, then: str) -> None:
    save = _exec("save", f"emu:{_TREE}", then=then)
    source.ask("migrate", uri=save)
    assert _ended(source) == "failed"
    assert source.ask("query-status")["status"] == "prelaunch"  # it can go on
