"""`mtetool emu`: from the words on the command line to the tags in the file."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from mtetool.backends import open_guest
from mtetool.backends.emu.patterns import PATTERNS, pattern_tags
from mtetool.cli import emu
from mtetool.guest import Memslot
from tests.cli.running import run, tags_of

BASE = 0x4000_0000
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guest"


def layout(path: Path) -> list[tuple[int, int, int, bool, str]]:
    slots = run("emu", "show", path, "--json").json["memslots"]
    return [(s["id"], s["ipa"], s["size_bytes"], s["readonly"], s["kind"]) for s in slots]


def test_the_patterns_are_those_that_there_are() -> None:
    assert emu._PATTERNS == PATTERNS


# --- create -------------------------------------------------------------------------------


def test_create_says_nothing_and_makes_a_guest(path: Path) -> None:
    outcome = run("emu", "create", path)
    assert (outcome.status, outcome.raw, outcome.err) == (0, b"", "")
    assert layout(path) == [(0, BASE, 1 << 30, False, "ram")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_blocks * 512 < MIB


def test_with_the_prefix(path: Path) -> None:
    assert run("emu", "create", f"emu:{path}", "--memory", "64K").status == 0
    assert run("emu", "show", f"emu:{path}").status == 0
    assert run("emu", "set", f"emu:{path}", "0x40000000:16=1").status == 0
    assert run("emu", "fill", f"emu:{path}", "random").status == 0
    assert path.exists()


def test_memory(path: Path) -> None:
    assert run("emu", "create", path, "--memory", "3M").status == 0
    assert layout(path) == [(0, BASE, 3 * MIB, False, "ram")]


def test_slots_are_numbered_as_given_and_shown_by_address(path: Path) -> None:
    words = ["--slot", "0x40000000:1M", "--slot", "0:64K:ro", "--slot", "1T:64K"]
    assert run("emu", "create", path, *words).status == 0
    assert layout(path) == [
        (1, 0, 65536, True, "rom"),
        (0, BASE, MIB, False, "ram"),
        (2, 1 << 40, 65536, False, "ram"),
    ]


@pytest.mark.parametrize(("word", "page"), [("4K", 4096), ("16K", 16384), ("64k", 65536)])
def test_page_size(path: Path, word: str, page: int) -> None:
    assert run("emu", "create", path, "--memory", "1M", "--page-size", word).status == 0
    assert run("emu", "show", path, "--json").json["page_size_bytes"] == page


def test_json(path: Path) -> None:
    outcome = run("emu", "create", path, "--memory", "64K", "--vcpus", "0", "--no-mte", "--json")
    assert outcome.status == 0
    assert outcome.json == {
        "schema": "mtetool.emu-create/1",
        "source": f"emu:{path}",
        "mte": False,
        "page_size_bytes": 4096,
        "memslots": [{"id": 0, "ipa": BASE, "size_bytes": 65536, "readonly": False, "kind": "ram"}],
        "vmm": None,
        "name": None,
        "pid": None,
        "vcpus": 0,
        "kernel_behaviours": [],
        "faults": [],
        "vanished": False,
    }
    assert run("emu", "show", path, "--json").json == {
        **outcome.json,
        "schema": "mtetool.emu-show/1",
    }


def test_hugetlb_memory_with_mte_is_a_behaviour_of_the_kernel(path: Path) -> None:
    create = ("emu", "create", path, "--slot", "1G:4M:ro:huge")
    refused = run(*create, "--json")
    assert (refused.status, "EINVAL" in refused.error["message"]) == (2, True)
    assert not path.exists()
    assert run(*create, "--kernel-behaviour", "hugetlb-tags").status == 0
    shown = run("emu", "show", path, "--json").json
    assert shown["kernel_behaviours"] == ["hugetlb-tags"]
    assert "hugetlb-tags" in run("emu", "show", path).out
    # The kernel looks at the memory when a slot is created, not when MTE is enabled.
    assert run(*create, "--no-mte", "--vcpus", "0", "--force").status == 0
    assert run("enable", f"emu:{path}").status == 0
    assert run("emu", "show", path, "--json").json["mte"] is True
    unknown = run(*create, "--force", "--kernel-behaviour", "toast")
    assert (unknown.status, "hugetlb-tags" in unknown.err) == (2, True)


def test_mte_can_be_enabled_without_vcpus_only(tmp_path: Path) -> None:
    run("emu", "create", tmp_path / "a", "--memory", "64K", "--no-mte", "--vcpus", "0")
    run("emu", "create", tmp_path / "b", "--memory", "64K", "--no-mte")
    assert run("emu", "set", tmp_path / "a", "0x40000000:16=1").status == 4
    assert run("enable", f"emu:{tmp_path / 'a'}").status == 0
    assert run("emu", "set", tmp_path / "a", "0x40000000:16=1").status == 0
    outcome = run("enable", f"emu:{tmp_path / 'b'}", "--json")
    assert (outcome.status, outcome.error["error"]) == (4, "vcpus-exist")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_filled(path: Path, pattern: str) -> None:
    words = ["--slot", "0x40000000:2M", "--slot", "0:1M:ro", "--page-size", "16K"]
    assert run("emu", "create", path, *words, "--fill", pattern, "--seed", "9").status == 0
    for slot in (Memslot(0, BASE, 2 * MIB), Memslot(1, 0, MIB)):
        n_granules = slot.size_bytes // 16
        expected = np.concatenate([*pattern_tags(pattern, 9, slot.ipa, n_granules, 1024)])
        assert np.array_equal(tags_of(path, slot), expected)


@pytest.mark.parametrize(
    "words",
    [
        ["--memory", "0"],
        ["--memory", "100"],
        ["--memory", "4K", "--page-size", "16K"],
        ["--memory", "1M", "--slot", "0:1M"],
        ["--slot", "0:0"],
        ["--slot", "100:4K"],
        ["--slot", "0:4100"],
        ["--slot", "0:8K", "--slot", "4K:4K"],
        ["--slot", "0:8K:rw"],
        ["--slot", "0xfffffffffffff000:8K"],
        ["--slot", "0"],
        ["--page-size", "8K"],
        ["--fill", "nix"],
        ["--no-mte", "--fill", "heap"],
        ["--seed", "-1"],
        ["--vcpus", "-1"],
        ["--fault", "x"],
    ],
)
def test_bad_usage_makes_nothing(path: Path, words: list[str]) -> None:
    outcome = run("emu", "create", path, *words)
    assert outcome.status == 2
    assert outcome.err.startswith("mtetool: error: ")
    assert not path.exists()


def test_an_existing_file_only_with_force(path: Path) -> None:
    path.write_text("precious")
    outcome = run("emu", "create", path, "--json")
    assert (outcome.status, outcome.error["error"]) == (2, "file-exists")
    assert "--force" in outcome.error["hint"]
    assert path.read_text() == "precious"
    assert run("emu", "create", path, "--force").status == 0
    assert layout(path)


def test_a_directory(tmp_path: Path) -> None:
    assert run("emu", "create", tmp_path, "--force").status == 2
    assert run("emu", "create", "").status == 2
    assert run("emu", "create", tmp_path / "no" / "guest").status == 2


def test_progress_for_programs(path: Path) -> None:
    outcome = run("emu", "create", path, "--memory", "1M", "--fill", "heap", "--progress", "json")
    assert outcome.error["schema"] == "mtetool.progress/1"
    assert outcome.error["done_bytes"] == outcome.error["total_bytes"] == MIB
    outcome = run("emu", "fill", path, "heap", "--progress", "json", "--quiet")
    assert outcome.err == ""


# --- show ---------------------------------------------------------------------------------


def test_show(tmp_path: Path) -> None:
    path = tmp_path / "a [red] guest"
    run("emu", "create", path, "--slot", "0x40000000:1M", "--slot", "0:64K:ro")
    outcome = run("emu", "show", path)
    assert outcome.status == 0
    assert outcome.out.splitlines() == [
        f"emu:{path}: MTE on, 1 vCPU, pages of 4 KiB",
        "slot         ipa  size    access",
        "   1         0x0  64 KiB  ro",
        "   0  0x40000000  1 MiB   rw",
    ]


def test_show_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "foreign").write_text("hello")
    for name, status in [("no", 2), ("foreign", 4), (".", 4)]:
        assert run("emu", "show", tmp_path / name).status == status


# --- set ----------------------------------------------------------------------------------


def test_set(path: Path) -> None:
    run("emu", "create", path, "--slot", "0:64K:ro", "--slot", "64K:64K")
    outcome = run("emu", "set", path, "0xfff0:48=0xa")
    assert (outcome.status, outcome.raw, outcome.err) == (0, b"", "")
    low, high = tags_of(path, Memslot(0, 0, 65536)), tags_of(path, Memslot(1, 65536, 65536))
    assert np.flatnonzero(low).tolist() == [4095]
    assert np.flatnonzero(high).tolist() == [0, 1]
    assert low[-1] == high[0] == high[1] == 10
    outcome = run("emu", "set", path, "0:64K=3", "--json")
    assert outcome.json == {
        "schema": "mtetool.emu-set/1",
        "source": f"emu:{path}",
        "ipa": 0,
        "size_bytes": 65536,
        "tag": 3,
    }


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("0x40000000:16", "usage"),
        ("0x40000000=1", "usage"),
        ("0x40000000:16=16", "usage"),
        ("0x40000000:16=", "usage"),
        ("0x40000000:0=1", "usage"),
        ("0x40000000:15=1", "misaligned"),
        ("0x40000008:16=1", "misaligned"),
        ("0x40000000:128K=1", "out-of-range"),
        ("0:16=1", "out-of-range"),
    ],
)
def test_bad_settings_change_nothing(path: Path, setting: str, error: str) -> None:
    run("emu", "create", path, "--memory", "64K")
    outcome = run("emu", "set", path, setting, "--json")
    assert (outcome.status, outcome.error["error"]) == (2, error)
    assert not tags_of(path, Memslot(0, BASE, 65536)).any()


def test_busy(path: Path) -> None:
    run("emu", "create", path, "--memory", "64K")
    with open_guest(f"emu:{path}"):
        assert run("emu", "show", path).status == 0
        outcome = run("emu", "set", path, "0x40000000:16=1", "--json")
        assert (outcome.status, outcome.error["error"]) == (4, "busy")


# --- fill ---------------------------------------------------------------------------------


def test_fill_one_slot_and_back_to_zero(path: Path) -> None:
    run("emu", "create", path, "--slot", "0:1M", "--slot", "1M:1M")
    first, second = Memslot(0, 0, MIB), Memslot(1, MIB, MIB)
    assert run("emu", "fill", path, "random", "--slot", "1").status == 0
    assert not tags_of(path, first).any()
    before = tags_of(path, second)
    assert before.any()
    assert run("emu", "fill", path, "random", "--slot", "1", "--seed", "2").status == 0
    assert not np.array_equal(tags_of(path, second), before)
    outcome = run("emu", "fill", path, "random", "--json")
    assert outcome.json == {
        "schema": "mtetool.emu-fill/1",
        "source": f"emu:{path}",
        "pattern": "random",
        "seed": 1,
        "slots": None,
        "ranges": None,
    }
    assert np.array_equal(tags_of(path, second), before)
    assert run("emu", "fill", path, "zero").status == 0
    assert not tags_of(path, first).any()
    assert not tags_of(path, second).any()


def test_fill_ranges(path: Path) -> None:
    run("emu", "create", path, "--slot", "0:1M", "--slot", "1M:1M:ro")
    both = Memslot(0, 0, 2 * MIB)
    words = ["--range", "4K:8K", "--range", "0xff000:8K", "--json"]
    outcome = run("emu", "fill", path, "random", *words)
    assert outcome.status == 0
    assert outcome.json["slots"] is None
    assert outcome.json["ranges"] == [
        {"ipa": 4096, "size_bytes": 8192},
        {"ipa": 0xFF000, "size_bytes": 8192},
    ]
    pages = tags_of(path, both).reshape(-1, 256).any(axis=1)
    assert np.flatnonzero(pages).tolist() == [1, 2, 255, 256]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--range", "4K:8K", "--range", "16:4K"], "misaligned"),
        (["--range", "4K:8K", "--range", "4K:16"], "misaligned"),
        (["--range", "4K:8K", "--range", "60K:8K"], "out-of-range"),
        (["--range", "0:4K", "--slot", "0"], "usage"),
        (["--range", "0:0"], "usage"),
    ],
)
def test_bad_ranges_change_nothing(path: Path, words: list[str], error: str) -> None:
    run("emu", "create", path, "--slot", "0:64K")
    outcome = run("emu", "fill", path, "random", *words, "--json")
    assert (outcome.status, outcome.error["error"]) == (2, error)
    assert not tags_of(path, Memslot(0, 0, 65536)).any()


def test_fill_bad_usage(path: Path) -> None:
    run("emu", "create", path, "--memory", "64K")
    assert run("emu", "fill", path, "nix").status == 2
    assert run("emu", "fill", path, "random", "--slot", "3").status == 2
    assert not tags_of(path, Memslot(0, BASE, 65536)).any()
