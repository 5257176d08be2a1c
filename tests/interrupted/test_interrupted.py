"""Interrupted work leaves no half file and loses no old one; running it again sets it right."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, cast

import pytest

from mtetool.guest import Memslot
from mtetool.snapshot.reader import SnapshotReader
from tests.cli.running import BASE, make_guest, run, same_tags
from tests.interrupted.campaign import Campaign, sample
from tests.interrupted.runs import MIB, RUNS, SLOTS, Run, holds, make_template

SHARE = float(os.environ.get("MTETOOL_INTERRUPTED_SHARE", "0.03"))
SEED = int(os.environ.get("MTETOOL_INTERRUPTED_SEED", "7"))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Campaign(tmp_path_factory.mktemp("runs")) as begun:
        yield begun


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with the guests and snapshots that the runs of the campaign find."""
    make_template(tmp_path / "files")
    return tmp_path / "files"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- every system call --------------------------------------------------------------------


@pytest.mark.parametrize("asked", RUNS, ids=lambda asked: asked.name)
def test_system_calls_that_fail_or_are_the_last(campaign: Campaign, asked: Run) -> None:
    """A sample of them; `make interrupted` tries all."""
    whole, found = campaign.record(asked)
    wrong = []
    for trial in sample(found, SHARE, SEED):
        came, message = campaign.interrupt(asked, trial, whole)
        assert came, f"{trial.inject} did not happen"
        wrong += [message] if message else []
    assert wrong == []


# --- disks that are full ------------------------------------------------------------------


def test_a_disk_that_is_full_at_any_byte(campaign: Campaign) -> None:
    """RLIMIT_FSIZE stands in: the kernel writes up to the limit, and refuses the rest."""
    saving = next(asked for asked in RUNS if asked.name == "save-over")
    whole, _ = campaign.record(saving)
    size = (whole / "old").stat().st_size
    # The smallest limit still has room for the report and an error.
    for limit in (1000, 4095, 4096, size // 2, size - 1, size):
        after = campaign.alone(saving, limit_bytes=limit)
        assert after.status == (0 if limit == size else 6), (limit, after.err)
        if after.status:
            assert "(EFBIG)" in after.err
            assert "ulimit -f" in after.err
        assert holds(after / "old", after / ("t" if after.status else "g"))
        assert names(after.directory) == names(whole.directory)


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of that size on the directory; yield a function that resizes it."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(directory)]
    subprocess.run(mount, check=True)

    def resize(size_bytes: int) -> None:
        again = ["mount", "-o", f"remount,size={size_bytes}", str(directory)]
        subprocess.run(again, check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(directory)], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@needs_root
def test_a_restore_onto_a_full_disk_at_any_block(files: Path, tmp_path: Path) -> None:
    """The guest's file is sparse: any write can be the one that finds no room."""
    (tmp_path / "disk").mkdir()
    refused = 0
    for pages in range(4, 80, 5):
        with small_disk(tmp_path / "disk", pages * 4096) as resize:
            guest = tmp_path / "disk" / "guest"
            made = run("emu", "create", guest, *_slots())
            assert made.status == 0, made.err
            done = run("restore", files / "s", f"emu:{guest}")
            if done.status:
                refused += 1
                assert done.status == 6, done.err
                assert "(ENOSPC)" in done.err
                assert "Traceback" not in done.err
                assert run("verify", files / "s", "--against", f"emu:{guest}").status == 1
            resize(1 << 20)
            assert run("restore", files / "s", f"emu:{guest}").status == 0
            assert run("diff", files / "s", f"emu:{guest}").status == 0
            assert same_tags(guest, files / "g", SLOTS)
    assert refused > 5


def _slots() -> list[str]:
    return [word for slot in SLOTS for word in ("--slot", f"{slot.ipa:#x}:{slot.size_bytes:#x}")]


@needs_root
def test_a_save_onto_a_full_disk_at_any_block(files: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    old = (files / "old").stat().st_size
    statuses = set()
    for n_bytes in range(old + 4096, 4 * old, 4096):
        with small_disk(tmp_path / "disk", n_bytes):
            target = tmp_path / "disk" / "s"
            shutil.copy(files / "old", target)
            done = run("save", f"emu:{files / 'g'}", "-o", target, "--force")
            statuses.add(done.status)
            assert holds(target, files / ("t" if done.status else "g"))
            assert names(target.parent) == ["s"]
        if not done.status:
            break
        assert "(ENOSPC)" in done.err
    assert statuses == {0, 6}


# --- pipes that are cut -------------------------------------------------------------------


def _cuts(snapshot: Path) -> list[int]:
    """The end of each record, and its middle."""
    edges = [0]
    with snapshot.open("rb") as stream:
        reader = SnapshotReader(stream, "it")
        edges.append(reader.offset)
        for _ in reader:
            edges.append(reader.offset)
    size = snapshot.stat().st_size
    edges += [size - 60, size - 1]
    middles = [(a + b) // 2 for a, b in pairwise(edges)]
    return sorted({*edges, *middles})


def test_a_pipe_that_is_cut_anywhere(files: Path, tmp_path: Path) -> None:
    data = (files / "s").read_bytes()
    written = 0
    for cut in _cuts(files / "s"):
        guest = tmp_path / "guest"
        shutil.copy(files / "t", guest)
        done = run("restore", "-", f"emu:{guest}", "--json", stdin=data[:cut])
        assert done.status == 5, (cut, done.err)
        assert done.error["error"] in ("truncated", "not-a-snapshot")
        if not _same(guest, files / "t"):
            written += 1
            assert done.error["restored_bytes"] > 0
            assert "already written" in done.error["message"]
        again = run("restore", "-", f"emu:{guest}", stdin=data)
        assert again.status == 0, again.err
        assert run("diff", files / "s", f"emu:{guest}").status == 0
    assert written > 1


def _same(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


# --- output that cannot be delivered ------------------------------------------------------

_TELLING = [
    ["info", "s"],
    ["info", "s", "--json"],
    ["verify", "s"],
    ["verify", "s", "--against", "emu:g", "--json"],
    ["dump", "emu:g"],
    ["dump", "emu:g", "--json"],
    ["dump", "s", "--output", "raw"],
    ["dump", "s", "--granules", "--range", f"{BASE:#x}:256K"],
    ["diff", "s", "emu:g"],
    ["diff", "s", "emu:t"],
    ["diff", "s", "emu:t", "--json"],
    ["list"],
    ["list", "--json"],
    ["probe"],
    ["probe", "--json"],
    ["emu", "show", "g"],
    ["save", "emu:g"],
    ["save", "emu:g", "-o", "new"],
    ["save", "emu:g", "-o", "new", "--force", "--json"],
    ["restore", "s", "emu:g"],
    ["restore", "s", "emu:g", "--json"],
    ["restore", "s", "emu:g", "--dry-run"],
]


@pytest.mark.parametrize("words", _TELLING, ids=" ".join)
def test_an_answer_that_nobody_gets_is_no_success(campaign: Campaign, words: list[str]) -> None:
    """A disk that is full, a standard output that is closed, a pipe without a reader."""
    asked = Run("", tuple(words), lambda *_: "")
    heard = campaign.alone(asked)
    for to, status in (("/dev/full", 6), ("-", 6), ("|", 141)):
        after = campaign.alone(asked, stdout=to)
        assert after.status == (status if heard.out else heard.status), (words, after.err)
        if status == 6 and heard.out:
            assert "mtetool: error" in after.err or '"error"' in after.err
            assert "ENOSPC" in after.err or "closed" in after.err or "EBADF" in after.err
        elif heard.out:
            assert "error" not in after.err
        assert "Exception" not in after.err
        # Work that is done stays done, and files that exist are whole.
        assert not (after / "new").exists() or holds(after / "new", after / "g")
        assert same_tags(after / "g", heard / "g", SLOTS)


# --- the directory for temporary files ----------------------------------------------------


def test_no_room_for_what_comes_from_a_pipe(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (files / "s").read_bytes()
    words = ["diff", "-", f"emu:{files / 'g'}"]
    assert run(*words, stdin=data).status == 0
    real = tempfile.TemporaryFile

    def full_file() -> IO[bytes]:
        return cast(IO[bytes], Path("/dev/full").open("r+b", buffering=0))

    monkeypatch.setattr(tempfile, "TemporaryFile", full_file)
    done = run(*words, "--json", stdin=data)
    assert (done.status, done.error["error"]) == (6, "disk-full")
    assert "temporary files" in done.error["message"]
    assert "(ENOSPC)" in done.error["message"]
    assert "TMPDIR" in done.error["hint"]
    monkeypatch.setattr(tempfile, "TemporaryFile", real)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    done = run(*words, "--json", stdin=data)
    assert (done.status, done.error["error"]) == (6, "io")
    assert "TMPDIR" in done.error["hint"]


# --- the header of an emulated guest ------------------------------------------------------


def test_a_header_is_changed_within_one_sector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a write is not torn, as one across two pages of the file could be."""
    slots = tuple(Memslot(n, BASE + n * 2 * MIB, MIB) for n in range(500))
    name = make_guest(tmp_path / "g", slots=slots, mte=False, vcpus=0)
    written: list[tuple[int, int]] = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        written.append((offset, offset + len(data)))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert run("enable", name).status == 0
    assert len(written) == 1
    assert 0 < written[0][0] < written[0][1] < 512
    assert run("emu", "show", tmp_path / "g", "--json").json["mte"] is True


def test_short_writes_are_gone_on_with(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        return real(fd, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert run("enable", f"emu:{files / 'off'}").status == 0
    assert run("emu", "create", files / "made", "--memory", "1M").status == 0
    monkeypatch.undo()
    assert run("emu", "show", files / "off", "--json").json["mte"] is True
    assert run("emu", "show", files / "made").status == 0


def test_a_guest_on_a_network_file_system_that_is_full(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may report that only when a file is closed; a file that was only read has no error."""
    real = os.close

    def close(fd: int) -> None:
        of_a_guest = Path(f"/proc/self/fd/{fd}").readlink() in (files / "t", files / "g")
        real(fd)
        if of_a_guest:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", close)
    done = run("restore", files / "s", f"emu:{files / 't'}", "--json")
    assert (done.status, done.error["error"]) == (6, "disk-full")
    assert str(files / "t") in done.error["message"]
    assert run("diff", files / "s", f"emu:{files / 'g'}").status == 0


# --- found by failing every system call ---------------------------------------------------


def test_an_io_error_on_the_way_to_a_new_guest_is_no_bad_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def lstat(path: str | Path, *, dir_fd: int | None = None) -> os.stat_result:
        if Path(path).name == "g":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "lstat", lstat)
    done = run("emu", "create", tmp_path / "g", "--json")
    assert (done.status, done.error["error"]) == (6, "io")
    assert "(EIO)" in done.error["message"]


def test_no_more_threads_is_no_bug(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    done = run("save", f"emu:{files / 'g'}", "-o", files / "new", "--json")
    assert (done.status, done.error["error"]) == (6, "host")
    assert "ulimit -u" in done.error["hint"]
    assert not (files / "new").exists()


def test_a_file_that_cannot_be_looked_at_is_not_taken_for_a_pipe(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a pipe, the first records are written before the last are known."""
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        if Path(f"/proc/self/fd/{fd}").readlink() == files / "s":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    before = (files / "t").read_bytes()
    monkeypatch.setattr(os, "fstat", fstat)
    done = run("restore", files / "s", f"emu:{files / 't'}", "--json")
    assert (done.status, done.error["error"]) == (6, "io")
    assert (files / "t").read_bytes() == before


class _Failing(io.BytesIO):
    """A file on a disk that fails."""

    def read(self, _: int | None = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("words", [["info"], ["verify"], ["dump"]])
def test_a_snapshot_on_a_failing_disk_is_not_called_damaged(
    files: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(Path, "open", lambda *_: _Failing())
    done = run(*words, files / "s", "--json")
    assert (done.status, done.error["error"]) == (6, "io")
    assert "(EIO)" in done.error["message"]
    assert done.error["errno"] == "EIO"
    assert "dmesg" in done.error["hint"]
