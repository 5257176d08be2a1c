"""A restore that ends half-way says where, in text and in JSON."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mtetool.backends import open_guest
from mtetool.backends.emu.guest import EmulatedGuest
from mtetool.errors import SignalError
from mtetool.flows.restore import RestoreOptions, restore
from mtetool.guest import Memslot
from mtetool.snapshot.reader import SnapshotReader
from tests.cli.running import BASE, make_guest, run, spawn, tags_of, write

MIB = 1 << 20
SLOTS = tuple(Memslot(n, BASE + 2 * n * MIB, MIB) for n in range(8))
END = SLOTS[-1].end


def two_guests(tmp_path: Path, slots: tuple[Memslot, ...] = SLOTS) -> tuple[Path, str]:
    """Make a snapshot of a guest full of tags, and an untagged guest of the same layout."""
    saved = make_guest(tmp_path / "saved", slots=slots)
    random = np.random.default_rng(1)
    for slot in slots:
        tags = random.integers(1, 16, slot.size_bytes // 16, dtype=np.uint8)
        write(tmp_path / "saved", slot.ipa, tags)
    assert run("save", saved, "-o", tmp_path / "file").status == 0
    return tmp_path / "file", make_guest(tmp_path / "guest", slots=slots)


def tagged_up_to(tmp_path: Path, slots: tuple[Memslot, ...] = SLOTS) -> int:
    """The address before which all memory has its tags."""
    for slot in slots:
        found, wanted = (tags_of(tmp_path / name, slot) for name in ("guest", "saved"))
        wrong = np.flatnonzero(found != wanted)
        if wrong.size:
            return slot.ipa + int(wrong[0]) * 16
    return slots[-1].end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal(tmp_path: Path, number: signal.Signals, as_json: bool) -> None:
    file, guest = two_guests(tmp_path)
    # Far too slow to end before the signal, which comes once it has begun to write.
    assert run("emu", "fault", tmp_path / "guest", "--fault", "slow=1M/s,on=write").status == 0
    words: list[str | Path] = [
        "restore",
        file,
        guest,
        "--progress",
        "json",
        *(["--json"] if as_json else []),
    ]
    with spawn(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        # The second piece begins when the first is done.
        while json.loads(process.stderr.readline())["done_bytes"] <= MIB:
            pass
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (-number, b"")
    lines = [line for line in err.decode().splitlines() if "mtetool.progress" not in line]
    up_to = tagged_up_to(tmp_path)
    if not as_json:
        said, hint = lines
        assert f"interrupted by {number.name}" in said
        assert "bytes of guest memory were already written" in said
        assert "run the same restore again" in hint
        return
    word = json.loads(*lines)
    assert (word["error"], word["status"]) == ("interrupted", 128 + number)
    assert 0 < word["restored_bytes"] < len(SLOTS) * MIB
    assert BASE < word["restored_up_to"] <= up_to < END
    assert word["not_restored"] == []


def test_a_signal_before_anything_is_written(tmp_path: Path) -> None:
    _, name = two_guests(tmp_path)

    def read() -> SnapshotReader:
        raise SignalError(signal.SIGINT)

    for dry_run in (False, True):
        with open_guest(name) as guest, pytest.raises(SignalError) as caught:
            restore(read, guest, RestoreOptions(dry_run=dry_run), again=True)
        word = caught.value.word
        if dry_run:
            assert word is None
        else:
            assert word is not None
            assert word.details == {"restored_bytes": 0}
            assert "nothing was written" in word.message


def test_a_signal_in_the_first_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, name = two_guests(tmp_path)
    write_tags = EmulatedGuest.write_tags

    def half(self: EmulatedGuest, ipa: int, tags: memoryview) -> int:
        if not len(tags):  # only asks whether writing is allowed
            return write_tags(self, ipa, tags)
        write_tags(self, ipa, tags[: len(tags) // 2])
        raise SignalError(signal.SIGINT)

    monkeypatch.setattr(EmulatedGuest, "write_tags", half)
    with open_guest(name) as guest, pytest.raises(SignalError) as caught, file.open("rb") as stream:
        restore(lambda: SnapshotReader(stream, "file"), guest, RestoreOptions(), again=False)
    assert tagged_up_to(tmp_path) > BASE
    word = caught.value.word
    assert word is not None
    assert "the first write had begun, and may have changed tags" in word.message
    assert word.details["restored_bytes"] == 0


@pytest.mark.parametrize("room_bytes", [MIB // 16 // 3, 5 * MIB // 16 // 2])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk(tmp_path: Path, room_bytes: int, as_json: bool) -> None:
    """A limit on the size of files stands in for it; a guest's file is mostly tags."""
    file, guest = two_guests(tmp_path)
    header_bytes = (tmp_path / "guest").stat().st_size - len(SLOTS) * MIB // 16
    limit = header_bytes + room_bytes

    def no_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with spawn(
        "restore", file, guest, *(["--json"] if as_json else []),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=no_more,
    ) as process:  # fmt: skip
        _, err = process.communicate()
    up_to = tagged_up_to(tmp_path)
    written = room_bytes // 256 * 4096
    expected = SLOTS[written // MIB].ipa + written % MIB
    assert process.returncode == 6
    if as_json:
        error = json.loads(err)
        assert (error["error"], error["errno"]) == ("disk-full", "EFBIG")
        assert (error["restored_bytes"], error["restored_up_to"]) == (written, expected)
        assert expected <= up_to < expected + 4096
    else:
        assert f"{written} bytes of guest memory were already written".encode() in err
        assert f"the last at {expected - 16:#x}".encode() in err
    # Once there is room, the same command is simply run again.
    assert run("restore", file, guest).status == 0
    assert tagged_up_to(tmp_path) == END


def test_a_signal_while_a_guest_is_filled(tmp_path: Path) -> None:
    make_guest(tmp_path / "guest", slots=(Memslot(0, BASE, MIB * MIB),))
    with spawn(
        "emu", "fill", tmp_path / "guest", "sparse", "--progress", "json", "--json",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["done_bytes"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == -signal.SIGTERM
    word = json.loads(err.splitlines()[-1])
    assert (word["error"], word["status"]) == ("interrupted", 143)
    assert " of 1 TiB were written" in word["message"]
