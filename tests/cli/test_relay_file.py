"""`relay save`, `relay load` and `relay filter` as libvirt and QEMU start them."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest

from mtetool.backends.emu.guest import EmulatedGuest
from mtetool.errors import GuestError, MteOffError
from mtetool.guest import GuestOptions
from mtetool.relay import standing_in
from mtetool.relay.guests import Wanted
from mtetool.relay.saved import MAGIC
from mtetool.relay.standing_in import StandIn, begins_with_tags, tagged_source
from mtetool.relay.stream import BEGINNING
from tests.cli.running import run, spawn
from tests.jsonkeys import check_keys
from tests.relay.saving import STREAM, guest, some_tags, tags, wanted

_TREE = Path(__file__).parents[2]


def _mtetool(*words: str | Path, data: bytes = b"", stdout: int = -1) -> tuple[int, bytes, str]:
    with spawn(*words, stdin=-1, stdout=stdout, stderr=-1) as process:
        out, err = process.communicate(data)
        return process.returncode, out or b"", err.decode()


def test_save_and_load(tmp_path: Path) -> None:
    source = f"emu:{guest(tmp_path / 'source', some_tags())}"
    status, file, said = _mtetool("relay", "save", source, data=STREAM)
    assert (status, file[:8]) == (0, MAGIC)
    assert f"saved {source} in" in said
    other = guest(tmp_path / "other")
    status, passed, said = _mtetool("relay", "load", f"emu:{other}", "--json", data=file)
    assert (status, passed) == (0, STREAM)
    report = json.loads(said.splitlines()[-1])
    check_keys(report)
    assert report["schema"] == "mtetool.relay/1"
    assert report["file_bytes"] == len(file)
    assert report["tag_pages"] == 32
    assert np.array_equal(tags(other), some_tags())
    status, _, said = _mtetool("relay", "save", source, "--quiet", data=STREAM)
    assert (status, said) == (0, "")


def test_save_to_a_full_disk(tmp_path: Path) -> None:
    source = guest(tmp_path / "source", some_tags())
    with Path("/dev/full").open("wb") as full:
        status, _, said = _mtetool("relay", "save", f"emu:{source}", data=STREAM, stdout=full)  # type: ignore[arg-type]
    assert status == 6
    assert "standard output: No space left on device (ENOSPC)" in said


def test_save_whose_reader_goes(tmp_path: Path) -> None:
    source = guest(tmp_path / "source", some_tags())
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as end:
        status, _, said = _mtetool("relay", "save", f"emu:{source}", data=STREAM, stdout=end)  # type: ignore[arg-type]
    assert (status, said.count("error")) == (141, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_save_that_is_killed_closes_the_pipe(tmp_path: Path, number: int) -> None:
    source = guest(tmp_path / "source", some_tags())
    with spawn("relay", "save", f"emu:{source}", stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(STREAM[: -len(STREAM) // 2])
        process.stdin.flush()
        process.send_signal(number)
        file = process.stdout.read()
        assert process.wait() == -number
        with pytest.raises(BrokenPipeError):
            os.write(process.stdin.fileno(), b"x")
        process.stdin.close()
    assert not file or run_load(tmp_path, file) == 5


def run_load(directory: Path, file: bytes) -> int:
    status, _, _ = _mtetool("relay", "load", f"emu:{guest(directory / 'new')}", data=file)
    return status


@pytest.mark.parametrize("task", ["save", "load"])
def test_no_vmm_at_the_other_end(task: str, tmp_path: Path) -> None:
    data = STREAM
    if task == "load":
        _, data, _ = _mtetool("relay", "save", f"emu:{guest(tmp_path / 'g')}", data=STREAM)
    status, _, said = _mtetool("relay", task, data=data)
    assert status == 4
    assert "no VMM of this host is seen at the other end of QEMU's pipe" in said
    assert "name the guest: kvm:PID" in said
    assert _mtetool("relay", task, "proc:1")[0] == 2


# --- the stand-in -------------------------------------------------------------------------------


@pytest.fixture
def filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the stand-in for gzip, first in PATH."""
    directory = tmp_path / "filters"
    directory.mkdir()
    text = run("relay", "filter", "--show", "program").out
    for name in ("gzip", "no-such-program"):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(_TREE))
    return directory


def _through(program: Path, *words: str, data: bytes | Path) -> tuple[int, bytes, str]:
    """Run a stand-in as libvirt does, with a pipe or a file as its standard input."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            file.seek(5)  # behind libvirt's header
            done = subprocess.run([program, *words], stdin=file, capture_output=True, check=False)
    else:
        done = subprocess.run([program, *words], input=data, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("data", [b"", b"short", STREAM, os.urandom(300_000)])
@pytest.mark.parametrize("is_file", [True, False])
def test_without_tags_it_is_the_real_program(
    filters: Path, tmp_path: Path, data: bytes, is_file: bool
) -> None:
    """On this machine there is no guest with tags, or it is not an arm64."""

    status, packed, said = _through(filters / "gzip", "-c", data=data)
    assert (status, said, gzip.decompress(packed)) == (0, "", data)
    (tmp_path / "file").write_bytes(b"head " + packed)
    given = tmp_path / "file" if is_file else packed
    assert _through(filters / "gzip", "-dc", data=given) == (0, data, "")


def test_errors_of_the_real_program_are_its_own(filters: Path) -> None:
    data = b"no gzip, for sure" * 999
    status, out, said = _through(filters / "gzip", "-dc", data=data)
    assert (status, out) == (1, BEGINNING)  # without which QEMU would wait
    assert "gzip: stdin: not in gzip format" in said
    assert "gzip" in _through(filters / "gzip", "--version", data=b"")[1].decode()
    status, _, said = _through(filters / "no-such-program", "-c", data=b"")
    assert status == 2
    assert "there is no other program of that name" in said


@pytest.mark.parametrize("is_file", [True, False])
def test_file_with_tags_is_loaded_whatever_the_compressor(
    filters: Path, tmp_path: Path, is_file: bool
) -> None:
    """It gets as far as the guest, which it would have found by the pipe."""
    _, file, _ = _mtetool("relay", "save", f"emu:{guest(tmp_path / 'g', some_tags())}", data=STREAM)
    (tmp_path / "file").write_bytes(b"head " + file)
    data = tmp_path / "file" if is_file else file
    status, passed, said = _through(filters / "gzip", "-dc", data=data)
    assert status == 4
    assert "no VMM of this host is seen at the other end of QEMU's pipe" in said
    assert passed == STREAM[: len(passed)] != b""
    status, passed, said = _through(filters / "gzip", "-dc", data=file[:-1])
    assert (status, passed) == (4, STREAM[: len(passed)])


def test_file_gets_nothing_of_a_program_that_fails(filters: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as file:
        words = [str(filters / "gzip"), "-dc"]
        assert subprocess.run(words, input=b"no gzip", stdout=file, check=False).returncode == 1
    assert out.read_bytes() == b""


@pytest.mark.parametrize("data", [b"some", b"something that is longer"])
def test_real_program_ends_with_it(
    filters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    pid = tmp_path / "pid"
    real = tmp_path / "real"
    real.mkdir()
    (real / "gzip").write_text(f"#!/bin/sh\necho $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 999")
    (real / "gzip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{filters}:{real}:{os.environ['PATH']}")
    words = [str(filters / "gzip"), "-dc"]
    with subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin
        process.stdin.write(data)
        process.stdin.close()
        while not pid.exists():
            assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
    assert not Path(f"/proc/{int(pid.read_text())}").exists()


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ("-c", "compress"),
        ("-c -3", "compress"),
        ("-3c", "compress"),
        ("--stdout", "compress"),
        ("-dc", "decompress"),
        ("-d -c", "decompress"),
        ("--decompress --stdout", "decompress"),
        ("--help", None),
        ("file-c-d", None),
        ("", None),
    ],
)
def test_what_it_is_asked_for(words: str, task: str | None) -> None:
    assert StandIn("/x/zstd", words.split()).task == task


def _pipe(data: bytes) -> int:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as end:
        end.write(data)
    return reading


def test_a_guest_with_tags_is_seen_before_anything_is_read(tmp_path: Path) -> None:
    fd = _pipe(STREAM)
    source = tagged_source(fd, wanted(guest(tmp_path / "with", some_tags())))
    assert source
    source.guest.close()
    assert tagged_source(fd, wanted(guest(tmp_path / "without", mte=False))) is None
    assert os.read(fd, len(STREAM)) == STREAM
    assert tagged_source(fd, wanted(tmp_path / "with")) is None  # nothing comes
    os.close(fd)


def test_guest_without_mte_needs_no_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt has it while it saves a domain, and only a VM with MTE tells its memslots."""
    fd = _pipe(STREAM)
    without = wanted(guest(tmp_path / "without", mte=False))
    monkeypatch.setattr(EmulatedGuest, "info", Mock(side_effect=MteOffError("as the kernel says")))
    assert tagged_source(fd, without) is None
    os.close(fd)


def test_in_doubt_about_tags_it_fails() -> None:
    """On a host whose guests can have MTE."""
    nobody = Wanted(None, GuestOptions())
    with patch.object(standing_in, "_host_has_no_mte", return_value=False):
        fd = _pipe(STREAM)
        with pytest.raises(GuestError, match="nobody is seen"):
            tagged_source(fd, nobody)
        os.close(fd)
        # A QEMU without KVM.
        script = "import os, time; os.write(1, b'QEVM'); time.sleep(1000)"
        with subprocess.Popen([sys.executable, "-c", script], stdout=-1) as process:
            assert process.stdout
            assert tagged_source(process.stdout.fileno(), nobody) is None
            process.kill()


def test_what_is_read_to_see_whose_file_it_is(tmp_path: Path) -> None:
    for data, ours in ((MAGIC + b"...", True), (b"mtesnap....", False), (b"mte", False)):
        fd = _pipe(data)
        assert begins_with_tags(fd) == (ours, data[:8])
        os.close(fd)
        (tmp_path / "file").write_bytes(data)
        with (tmp_path / "file").open("rb") as file:
            assert begins_with_tags(file.fileno()) == (ours, b"")
            assert file.read() == data


def test_what_is_installed() -> None:
    unit = run("relay", "filter", "--show", "unit").out
    rules = run("relay", "filter", "--show", "apparmor").out
    directory = "/usr/lib/mtetool/filters"
    assert f"Environment=PATH={directory}:" in unit
    assert f"  {directory}/* PUxr,\n" in rules
    assert run("relay", "filter").status == 2
