"""`mtetool save` as a user meets it."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from mtetool.backends.emu.guest import EmulatedGuest
from mtetool.buffers import TagBuffer
from mtetool.errors import GuestLostError
from mtetool.guest import Memslot
from tests.cli.running import BASE, KIB, ROM, make_guest, run, spawn


@pytest.fixture
def guest(tmp_path: Path) -> str:
    return make_guest(tmp_path / "g", seed=3)


def test_a_report_for_people(guest: str, tmp_path: Path) -> None:
    done = run("save", guest, "-o", tmp_path / "s")
    assert done.status == 0
    assert "832 KiB" in done.out
    assert "consistent: yes" in done.out
    assert done.err == ""
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_a_report_for_programs(guest: str, tmp_path: Path) -> None:
    report = run("save", guest, "-o", tmp_path / "s", "--json").json
    assert report["schema"] == "mtetool.save/1"
    assert report["saved_bytes"] == 832 * KIB
    assert report["file_bytes"] == (tmp_path / "s").stat().st_size
    assert report["consistent"] is True
    assert report["missing"] == []
    assert report["scope"][0] == {"ipa": ROM, "size_bytes": 64 * KIB}


def test_down_a_pipe_the_report_goes_to_standard_error(guest: str, tmp_path: Path) -> None:
    for arguments in (["save", guest], ["save", guest, "-o", "-"]):
        done = run(*arguments, "--json")
        assert done.status == 0
        assert b"mtetool.save/1" not in done.raw
        assert "mtetool.save/1" in done.err
        (tmp_path / "s").write_bytes(done.raw)
        assert run("verify", tmp_path / "s").status == 0


def test_existing_files_are_kept(guest: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    done = run("save", guest, "-o", tmp_path / "s", "--json")
    assert (done.status, done.error["error"]) == (2, "file-exists")
    assert (tmp_path / "s").read_text() == "precious"
    assert run("save", guest, "-o", tmp_path / "s", "--force").status == 0
    assert run("verify", tmp_path / "s").status == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--range", f"{BASE + 16:#x}:4K"], "misaligned"),
        (["--range", f"{BASE:#x}:4000"], "misaligned"),
        (["--range", "0x0:4K"], "out-of-range"),
        (["--range", f"{BASE:#x}:4K", "--range", "1T:4K"], "out-of-range"),
        (["--range", f"{BASE:#x}"], "usage"),
        (["--range", "0xffffffffffffffff:4K"], "usage"),
        (["--slot", "7"], "usage"),
        (["--slot", "0", "--range", f"{BASE:#x}:4K"], "usage"),
        (["--level", "99"], "usage"),
    ],
)
def test_bad_requests_leave_no_file(
    guest: str, tmp_path: Path, arguments: list[str], error: str
) -> None:
    done = run("save", guest, "-o", tmp_path / "s", "--json", *arguments)
    assert (done.status, done.error["error"]) == (2, error)
    assert not (tmp_path / "s").exists()


def test_a_misaligned_range_is_told_what_would_do(guest: str, tmp_path: Path) -> None:
    done = run("save", guest, "-o", tmp_path / "s", "--range", f"{BASE + 16:#x}:16")
    assert f"{BASE:#x}:0x1000" in done.err


def test_a_range_across_a_hole_is_partial(guest: str, tmp_path: Path) -> None:
    hole = BASE + 512 * KIB
    arguments = ["save", guest, "-o", str(tmp_path / "s"), "--range", f"{BASE:#x}:1088K"]
    done = run(*arguments)
    assert done.status == 3
    assert f"{hole:#x}:0x80000" in done.out
    assert "EFAULT: no memslot there" in done.out
    failed = run(*arguments, "--force", "--partial", "fail")
    assert failed.status == 3
    assert f"{hole:#x}" in failed.err
    report = run(*arguments, "--force", "--json").json
    assert report["missing"] == [
        {
            "ipa": hole,
            "size_bytes": 512 * KIB,
            "errno": "EFAULT",
            "reason": "no memslot there",
        }
    ]


def test_partial_fail_leaves_no_file(guest: str, tmp_path: Path) -> None:
    done = run("save", guest, "-o", tmp_path / "s", "--range", f"{BASE:#x}:1M", "--partial", "fail")
    assert done.status == 3
    assert not (tmp_path / "s").exists()


def test_one_slot(guest: str, tmp_path: Path) -> None:
    report = run("save", guest, "-o", tmp_path / "s", "--slot", "2", "--json").json
    assert report["scope"] == [{"ipa": BASE + 1024 * KIB, "size_bytes": 256 * KIB}]


@pytest.mark.parametrize(
    ("source", "status", "error"),
    [
        ("emu:/nonexistent/guest", 2, "no-such-file"),
        ("nonsense:1", 2, "bad-source"),
        ("plain-file", 2, "bad-source"),
    ],
)
def test_guests_that_are_none(tmp_path: Path, source: str, status: int, error: str) -> None:
    done = run("save", source, "-o", tmp_path / "s", "--json")
    assert (done.status, done.error["error"]) == (status, error)
    assert not (tmp_path / "s").exists()


def test_no_such_process_and_a_host_that_is_not_arm64(tmp_path: Path) -> None:
    done = run("save", "kvm:999999", "-o", tmp_path / "s", "--json")
    expected = "no-such-process" if os.uname().machine == "aarch64" else "not-arm64"
    assert (done.status, done.error["error"]) == (4, expected)


def test_a_guest_without_mte(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "g", mte=False)
    done = run("save", guest, "-o", tmp_path / "s", "--json")
    assert (done.status, done.error["error"]) == (4, "mte-off")
    assert not (tmp_path / "s").exists()


def test_a_running_guest_is_warned_of(
    guest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedGuest, "paused", lambda self: False)
    done = run("save", guest, "-o", tmp_path / "s")
    assert done.status == 0
    assert "ran during the save" in done.err
    assert "consistent: no" in done.out
    assert run("save", guest, "-o", tmp_path / "q", "--quiet").err == ""
    assert run("info", tmp_path / "s", "--json").json["consistent"] is False


@pytest.mark.parametrize("partial", [None, "keep", "fail"])
def test_a_guest_that_ends_half_way(
    guest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial: str | None
) -> None:
    read = EmulatedGuest.read_tags

    def read_the_first_slot(self: EmulatedGuest, ipa: int, out: TagBuffer) -> int:
        if ipa >= BASE:
            raise GuestLostError("the process ended")
        return read(self, ipa, out)

    monkeypatch.setattr(EmulatedGuest, "read_tags", read_the_first_slot)
    # Like a guest that can be lost: its chunks are read one after the other.
    monkeypatch.setattr(EmulatedGuest, "any_thread_reads", lambda self, extent: False)
    options = ["--partial", partial] if partial else []
    done = run("save", guest, "-o", tmp_path / "s", *options)
    assert done.status == 4
    assert f"{64 * KIB} bytes had been read" in (done.out if partial == "keep" else done.err)
    # The file is kept only when that was asked for explicitly.
    assert (tmp_path / "s").exists() is (partial == "keep")
    if partial == "keep":
        assert run("verify", tmp_path / "s").status == 3


def test_device_slots_are_left_out_and_named(tmp_path: Path) -> None:
    slots = (Memslot(0, BASE, 64 * KIB), Memslot(1, ROM, 64 * KIB, kind="device"))
    guest = make_guest(tmp_path / "g", slots=slots)
    done = run("save", guest, "-o", tmp_path / "s")
    assert done.status == 0
    assert f"slot 1 at {ROM:#x}" in done.out


def test_a_full_disk(guest: str, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        child = spawn("save", guest, "--json", stdout=full, stderr=subprocess.PIPE)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 6
    assert b"disk-full" in err
    assert run("save", guest, "-o", "/dev/full", "--force").status == 6


def test_a_closed_pipe_is_quiet(guest: str) -> None:
    child = spawn("save", guest, "--quiet", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait(timeout=30) == 141


def test_ctrl_c_half_way_leaves_no_file(tmp_path: Path) -> None:
    slots = (Memslot(0, BASE, 32 * 1024 * KIB),)
    guest = make_guest(tmp_path / "g", seed=5, slots=slots)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Nothing reads the pipe: the save stops when it is full.
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    child = spawn("save", guest, "-o", fifo, "--force", stderr=subprocess.PIPE)
    wait_until_full(reader, child)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=30) in (130, -signal.SIGINT)
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "g"]


def wait_until_full(reader: int, child: subprocess.Popen[bytes]) -> None:
    """Wait until there is something in the pipe, which means that the save is under way."""
    for _ in range(300):
        if select.select([reader], [], [], 0.1)[0]:
            time.sleep(0.2)
            assert child.poll() is None
            return
    raise AssertionError("the save does not start")


def test_memory_that_was_told_and_is_not_there(guest: str, tmp_path: Path) -> None:
    """The guest's own slots count, not --memslot: the rest is reported as missing."""
    told = ("--memslot", f"{ROM:#x}:64K", "--memslot", f"{BASE:#x}:4M")
    done = run("save", guest, *told, "-o", tmp_path / "s", "--json")
    assert done.status == 3
    assert [(row["ipa"], row["size_bytes"]) for row in done.json["missing"]] == [
        (BASE + 512 * KIB, 512 * KIB),
        (BASE + 1280 * KIB, 4096 * KIB - 1280 * KIB),
    ]
