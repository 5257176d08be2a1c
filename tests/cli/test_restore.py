"""`mtetool restore` as a user meets it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtetool.guest import Memslot
from tests.cli.running import (
    BASE,
    KIB,
    ROM,
    SLOTS,
    make_guest,
    run,
    same_tags,
    set_tag,
    spawn,
    tags_of,
)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    make_guest(tmp_path / "g", seed=3)
    return tmp_path / "g"


@pytest.fixture
def snapshot(guest: Path, tmp_path: Path) -> Path:
    assert run("save", f"emu:{guest}", "-o", tmp_path / "s").status == 0
    return tmp_path / "s"


def dirty(path: Path, *, rom_tag: int = 3) -> str:
    """Make a guest with other tags; by default, its read-only slot has the first guest's."""
    name = make_guest(path, seed=9)
    set_tag(path, ROM, 64 * KIB, rom_tag)
    return name


def test_over_a_dirty_guest(guest: Path, snapshot: Path, tmp_path: Path) -> None:
    target = dirty(tmp_path / "t")
    assert not same_tags(guest, tmp_path / "t")
    done = run("restore", snapshot, target)
    assert done.status == 0
    assert "768 KiB" in done.out
    assert same_tags(guest, tmp_path / "t")
    assert run("verify", snapshot, "--against", target).status == 0
    assert run("diff", f"emu:{guest}", target).status == 0


def test_from_a_pipe(guest: Path, snapshot: Path, tmp_path: Path) -> None:
    target = dirty(tmp_path / "t")
    report = run("restore", "-", target, "--json", stdin=snapshot.read_bytes()).json
    assert report["schema"] == "mtetool.restore/1"
    assert report["restored_bytes"] == report["verified_bytes"] == 768 * KIB
    assert report["readonly_bytes"] == 64 * KIB
    assert same_tags(guest, tmp_path / "t")


def test_from_a_pipe_between_processes(guest: Path, tmp_path: Path) -> None:
    target = dirty(tmp_path / "t")
    saving = spawn("save", f"emu:{guest}", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    restoring = spawn("restore", "-", target, stdin=saving.stdout, stdout=subprocess.DEVNULL)
    assert restoring.wait(timeout=60) == 0
    assert saving.wait(timeout=60) == 0
    assert same_tags(guest, tmp_path / "t")


def test_read_only_memory_that_differs(guest: Path, snapshot: Path, tmp_path: Path) -> None:
    target = dirty(tmp_path / "t", rom_tag=4)
    done = run("restore", snapshot, target)
    assert done.status == 3
    assert f"{ROM:#x}:0x10000" in done.out
    report = run("restore", snapshot, target, "--json").json
    assert report["readonly_differing"] == [{"ipa": ROM, "size_bytes": 64 * KIB}]


def test_a_dry_run_changes_nothing(snapshot: Path, tmp_path: Path) -> None:
    target = dirty(tmp_path / "t")
    before = [tags_of(tmp_path / "t", slot) for slot in SLOTS]
    done = run("restore", snapshot, target, "--dry-run", "--json")
    assert done.status == 0
    assert done.json["dry_run"] is True
    assert done.json["changes_bytes"] > 0
    after = [tags_of(tmp_path / "t", slot) for slot in SLOTS]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert run("restore", snapshot, target).status == 0
    assert "no tag would change" in run("restore", snapshot, target, "--dry-run").out


def test_missing_ranges_are_left_alone(guest: Path, tmp_path: Path) -> None:
    hole = BASE + 512 * KIB
    partial = tmp_path / "p"
    assert run("save", f"emu:{guest}", "-o", partial, "--range", f"{BASE:#x}:1M").status == 3
    target = dirty(tmp_path / "t")
    done = run("restore", partial, target)
    assert done.status == 3
    assert f"{hole:#x}:0x80000" in done.out
    assert np.array_equal(tags_of(guest, SLOTS[1]), tags_of(tmp_path / "t", SLOTS[1]))


def test_a_slot_that_lives_elsewhere(guest: Path, snapshot: Path, tmp_path: Path) -> None:
    slots = (SLOTS[0], Memslot(0, 2 * BASE, 512 * KIB), SLOTS[2])
    target = make_guest(tmp_path / "t", slots=slots)
    set_tag(tmp_path / "t", ROM, 64 * KIB, 3)
    refused = run("restore", snapshot, target, "--json")
    assert (refused.status, refused.error["error"]) == (4, "layout")
    assert "--map" in refused.error["hint"]
    assert not tags_of(tmp_path / "t", SLOTS[2]).any()
    done = run("restore", snapshot, target, "--map", f"{BASE:#x}={2 * BASE:#x}")
    assert done.status == 0
    assert np.array_equal(tags_of(guest, SLOTS[1]), tags_of(tmp_path / "t", slots[1]))
    assert np.array_equal(tags_of(guest, SLOTS[2]), tags_of(tmp_path / "t", slots[2]))


@pytest.mark.parametrize(
    ("moves", "error"),
    [
        ("0x1234", "usage"),
        ("0x123000=0x456000", "usage"),
        (f"{BASE:#x}={BASE + 16:#x}", "misaligned"),
    ],
)
def test_bad_maps(snapshot: Path, guest: Path, moves: str, error: str) -> None:
    done = run("restore", snapshot, f"emu:{guest}", "--map", moves, "--json")
    assert (done.status, done.error["error"]) == (2, error)


def test_two_slots_onto_one(snapshot: Path, guest: Path) -> None:
    done = run("restore", snapshot, f"emu:{guest}", "--map", f"{BASE:#x}={BASE + 1024 * KIB:#x}")
    assert done.status == 4


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_a_cut_snapshot(guest: Path, snapshot: Path, tmp_path: Path, way: str) -> None:
    target = dirty(tmp_path / "t")
    before = [tags_of(tmp_path / "t", slot) for slot in SLOTS]
    data = snapshot.read_bytes()[:-30]
    if way == "file":
        snapshot.write_bytes(data)
        done = run("restore", snapshot, target, "--json")
    else:
        done = run("restore", "-", target, "--json", stdin=data)
    assert (done.status, done.error["error"]) == (5, "truncated")
    after = [tags_of(tmp_path / "t", slot) for slot in SLOTS]
    untouched = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert untouched is (way == "file")
    assert done.error.get("restored_bytes") == (None if way == "file" else 768 * KIB)
    assert ("already written" in done.error["message"]) is (way == "pipe")


def test_a_guest_without_mte(snapshot: Path, tmp_path: Path) -> None:
    target = make_guest(tmp_path / "t", mte=False)
    done = run("restore", snapshot, target, "--json")
    assert (done.status, done.error["error"]) == (4, "mte-off")


def test_no_such_process_and_a_host_that_is_not_arm64(snapshot: Path) -> None:
    done = run("restore", snapshot, "kvm:999999", "--json")
    expected = "no-such-process" if os.uname().machine == "aarch64" else "not-arm64"
    assert (done.status, done.error["error"]) == (4, expected)


@pytest.mark.parametrize("pages", [(4096, 65536), (65536, 4096), (16384, 65536)])
def test_other_page_sizes(tmp_path: Path, pages: tuple[int, int]) -> None:
    first = make_guest(tmp_path / "a", seed=3, page_size_bytes=pages[0])
    second = make_guest(tmp_path / "b", seed=8, page_size_bytes=pages[1])
    set_tag(tmp_path / "b", ROM, 64 * KIB, 3)
    assert run("save", first, "-o", tmp_path / "s").status == 0
    assert run("restore", tmp_path / "s", second).status == 0
    assert same_tags(tmp_path / "a", tmp_path / "b")


def test_a_slot_that_does_not_end_on_a_page_of_the_target(tmp_path: Path) -> None:
    first = make_guest(tmp_path / "a", seed=3, slots=(Memslot(0, BASE, 68 * KIB),))
    slots = (Memslot(0, BASE, 128 * KIB),)
    second = make_guest(tmp_path / "b", slots=slots, page_size_bytes=65536)
    assert run("save", first, "-o", tmp_path / "s").status == 0
    done = run("restore", tmp_path / "s", second, "--json")
    assert (done.status, done.error["error"]) == (4, "layout")
    assert not tags_of(tmp_path / "b", slots[0]).any()


TAGGED = st.lists(
    st.tuples(st.integers(0, 4095), st.integers(1, 600), st.integers(0, 15)), max_size=8
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tags=TAGGED, other=TAGGED, data=st.data())
def test_any_tags_come_back(
    tmp_path: Path,
    tags: list[tuple[int, int, int]],
    other: list[tuple[int, int, int]],
    data: st.DataObject,
) -> None:
    slots = (Memslot(0, BASE, 64 * KIB),)
    paths = (tmp_path / "a", tmp_path / "b", tmp_path / "s")
    for path in paths:
        path.unlink(missing_ok=True)
    for path, patches in ((paths[0], tags), (paths[1], other)):
        make_guest(path, slots=slots)
        for first, length, tag in patches:
            length = min(length, 4096 - first)
            set_tag(path, BASE + first * 16, length * 16, tag)
    first = data.draw(st.integers(0, 15))
    n_pages = data.draw(st.integers(1, 16 - first))
    before = tags_of(paths[1], slots[0])
    ranges = ["--range", f"{BASE + first * 4096:#x}:{n_pages * 4096}"]
    assert run("save", f"emu:{paths[0]}", "-o", paths[2], *ranges).status == 0
    assert run("restore", paths[2], f"emu:{paths[1]}").status == 0
    wanted = before.copy()
    part = slice(first * 256, (first + n_pages) * 256)
    wanted[part] = tags_of(paths[0], slots[0])[part]
    assert np.array_equal(tags_of(paths[1], slots[0]), wanted)
