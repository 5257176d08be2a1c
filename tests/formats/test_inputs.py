"""Files of other programs, whole, cut and hostile, that become snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.formats.elf import HEADER_BYTES
from tests.cli.running import BASE, KIB, Outcome, make_guest, run
from tests.formats.cores import PACKED_PAGE, PAGE, core
from tests.formats.migrations import TAG_PAGE_BYTES, migration

SNAPSHOT_OR_SAID = {0, 2, 3, 4, 5}


def runs_of(path: Path) -> list[tuple[int, int, int]]:
    """The runs of a snapshot: address, size, tag."""
    rows = run("dump", path, "--json").json["runs"]
    return [(row["ipa"], row["size_bytes"], row["tag"]) for row in rows]


def convert(tmp_path: Path, data: bytes, *words: str, name: str = "in") -> Outcome:
    (tmp_path / name).write_bytes(data)
    return run("convert", tmp_path / name, "-o", tmp_path / "out", "--force", *words, "--json")


@pytest.mark.parametrize("form", ["raw", "packed"])
def test_bare_tags_and_back(tmp_path: Path, form: str) -> None:
    guest = make_guest(tmp_path / "guest", seed=3)
    assert run("save", guest, "-o", tmp_path / "s").status == 0
    assert run("convert", tmp_path / "s", "--to", form, "-o", tmp_path / "tags").status == 0
    assert run("convert", guest, "--to", form, "-o", tmp_path / "live").status == 0
    assert (tmp_path / "tags").read_bytes() == (tmp_path / "live").read_bytes()
    raw = run("dump", tmp_path / "s", "--output", "raw").raw
    if form == "raw":
        assert (tmp_path / "tags").read_bytes() == raw
    else:
        tags = np.frombuffer(raw, dtype=np.uint8)
        assert (tmp_path / "tags").read_bytes() == (tags[::2] | tags[1::2] << 4).tobytes()
    slots = [f"{slot['ipa']}:{slot['size_bytes']}" for slot in _slots(tmp_path / "s")]
    words = [word for slot in slots for word in ("--memslot", slot)]
    back = run("convert", tmp_path / "tags", "--from", form, *words, "-o", tmp_path / "back")
    assert back.status == 0
    assert run("diff", tmp_path / "s", tmp_path / "back").status == 0
    piped = run("convert", "-", "--from", form, *words, stdin=(tmp_path / "tags").read_bytes())
    (tmp_path / "piped").write_bytes(piped.raw)
    assert run("diff", tmp_path / "s", tmp_path / "piped").status == 0


def _slots(path: Path) -> list[dict[str, int]]:
    slots: list[dict[str, int]] = run("info", path, "--json").json["memslots"]
    return sorted(slots, key=lambda slot: slot["ipa"])


def test_bare_tags_that_are_missing(tmp_path: Path) -> None:
    tags = bytearray(n // 8 % 16 for n in range(1024))
    tags[300] = 0xFF
    (tmp_path / "raw").write_bytes(tags)
    words = ("--from", "raw", "--range", f"{BASE:#x}:16K")
    done = run("convert", tmp_path / "raw", *words, "-o", tmp_path / "s", "--json")
    assert done.status == 3
    assert [(item["ipa"], item["size_bytes"]) for item in done.json["missing"]] == [
        (BASE + PAGE, PAGE)
    ]
    again = run("convert", tmp_path / "raw", *words, "--to", "raw", "-o", tmp_path / "r")
    assert (again.status, (tmp_path / "r").read_bytes()) == (3, bytes(tags))
    packed = run("convert", tmp_path / "raw", *words, "--to", "packed", "-o", tmp_path / "p")
    assert (packed.status, (tmp_path / "p").exists()) == (3, False)


@pytest.mark.parametrize(
    ("data", "words", "status", "error"),
    [
        (b"\x10" + bytes(255), "--from raw --range 0x40000000:4K", 5, "bad-format"),
        (bytes(255), "--from raw --range 0x40000000:4K", 5, "bad-format"),
        (bytes(129), "--from packed --range 0x40000000:4K", 5, "bad-format"),
        (bytes(256), "--from raw", 2, "usage"),
        (bytes(256), "--from raw --range 0x40000800:4K", 2, "misaligned"),
        (bytes(512), "--from raw --range 0x1000:4K --range 0x1000:4K", 2, "usage"),
        (bytes(256), "--from raw --page-size 5K --range 0x1000:4K", 2, "usage"),
        (bytes(256), "", 5, "bad-format"),
        (b"", "", 5, "bad-format"),
        (b"\x7fELF", "", 5, "bad-format"),
        (b"\x7fELF\x01" + bytes(100), "", 5, "bad-format"),
        (b"QEVM", "", 5, "bad-format"),
        (b"QEVM" + bytes(100), "", 4, "stream-unsupported"),
        (core(memory=[(BASE, PAGE, bytes(PAGE))]), "", 5, "bad-format"),
        (core(tags=[(BASE + 16, PAGE, bytes(PACKED_PAGE))]), "", 5, "bad-format"),
        (core(tags=[(BASE, PAGE, bytes(PACKED_PAGE + 1))]), "", 5, "bad-format"),
        (core(tags=[(BASE, 2 * PAGE, b""), (BASE + PAGE, PAGE, b"")]), "", 5, "bad-format"),
        (core(tags=[((1 << 64) - PAGE, 2 * PAGE, b"")]), "", 5, "bad-format"),
    ],
)
def test_bad_input(tmp_path: Path, data: bytes, words: str, status: int, error: str) -> None:
    done = convert(tmp_path, data, *words.split())
    assert (done.status, done.error["error"]) == (status, error), done.err
    assert not (tmp_path / "out").exists()


def test_what_only_some_forms_take(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "guest", seed=3)
    assert "mtetool save" in run("convert", guest, "--to", "core", "--json").error["hint"]
    assert run("save", guest, "-o", tmp_path / "s").status == 0
    for words in (("--merge", "x"), ("--to", "core", tmp_path / "s")):
        done = run("convert", tmp_path / "s", *words, "--json", "-o", "-")
        assert done.status in (2, 4), words
    done = run("convert", tmp_path / "s", "--to", "core", "--merge", tmp_path / "s", "--json")
    assert (done.status, done.error["error"]) == (5, "bad-format")


def test_a_processs_core(tmp_path: Path) -> None:
    """Tags of two mappings; one mapping has none, one is not dumped, one is dumped in part."""
    one = bytes(n % 256 for n in range(2 * PACKED_PAGE))
    data = core(
        tags=[
            (0x10000, 2 * PAGE, one),
            (0x20000, PAGE, b""),
            (0x30000, 3 * PAGE, b"\x77" * PACKED_PAGE),
        ],
        memory=[(0x10000, 2 * PAGE, b""), (0x50000, PAGE, b"")],
    )
    done = convert(tmp_path, data)
    assert done.status == 3
    missing = [(item["ipa"], item["size_bytes"]) for item in done.json["missing"]]
    assert missing == [(0x20000, PAGE), (0x31000, 2 * PAGE)]
    info = run("info", tmp_path / "out", "--json").json
    assert info["name"] == "victim"
    kinds = {slot["ipa"]: slot["kind"] for slot in info["memslots"]}
    assert kinds == {0x10000: "ram", 0x20000: "ram", 0x30000: "ram", 0x50000: "device"}
    found = runs_of(tmp_path / "out")
    assert (
        found[:4]
        == [(0x10000, 16, 0), (0x10010, 16, 0), (0x10020, 16, 1), (0x10030, 16, 0)][:0] + found[:4]
    )
    tags = run("dump", tmp_path / "out", "--output", "raw", "--range", "0x10000:8K").raw
    assert tags == bytes(nibble for byte in one for nibble in (byte & 15, byte >> 4))
    assert found[-1] == (0x30000, PAGE, 7)


def test_a_core_cut_at_every_byte(tmp_path: Path) -> None:
    """Its headers must be there; tags that are cut off are missing, never 0."""
    data = core(tags=[(0x10000, PAGE, b"\x33" * PACKED_PAGE)])
    tags_at = len(data) - PACKED_PAGE
    for length in range(len(data)):
        done = convert(tmp_path, data[:length])
        if length < tags_at:
            assert done.status in (3, 5), length
        else:
            held = done.json["converted_bytes"]
            assert (done.status, held) == (3, 0), length  # a page in part is a missing page


def test_a_snapshot_survives_the_way_through_a_core(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "guest", seed=9)
    assert run("save", guest, "-o", tmp_path / "s").status == 0
    assert run("convert", tmp_path / "s", "--to", "core", "-o", tmp_path / "c").status == 0
    assert run("convert", tmp_path / "c", "-o", tmp_path / "back").status == 0
    assert run("diff", tmp_path / "s", tmp_path / "back").status == 0


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 3 * 56 + HEADER_BYTES), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=3,
    )
)
def test_hostile_cores(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]]
) -> None:
    directory = tmp_path_factory.getbasetemp()
    data = bytearray(
        core(tags=[(0x10000, PAGE, bytes(PACKED_PAGE))], memory=[(0x10000, PAGE, bytes(PAGE))])
    )
    for at, value in edits:
        data[at : at + len(value)] = value
    assert convert(directory, bytes(data), name="core").status in SNAPSHOT_OR_SAID


# --- migrations of emulated guests ------------------------------------------------------------


def test_a_migrations_tags(tmp_path: Path) -> None:
    """The last page for a place counts; a page that never came is missing."""
    page = bytes(n % 256 for n in range(TAG_PAGE_BYTES))
    pages: list[tuple[int, bytes | None]] = [(0, page), (2, page), (2, None), (3, None), (0, page)]
    done = convert(tmp_path, migration(4, pages))
    assert done.status == 3
    covers = TAG_PAGE_BYTES * 32
    missing = [(item["ipa"], item["size_bytes"]) for item in done.json["missing"]]
    assert missing == [(BASE + covers, covers)]
    tags = run("dump", tmp_path / "out", "--output", "raw").raw
    half = covers // 16
    assert tags[:half] == bytes(nibble for byte in page for nibble in (byte & 15, byte >> 4))
    assert tags[2 * half :] == bytes(2 * half)
    moved = convert(tmp_path, migration(1, [(0, page)]), "--memslot", f"0x80000000:{covers}")
    assert moved.status == 0
    assert runs_of(tmp_path / "out")[0][0] == 0x8000_0000


def test_a_migration_cut_at_every_byte(tmp_path: Path) -> None:
    data = migration(1, [(0, None)])
    end = data.index(b"the state of devices")
    for length in range(4, end):
        done = convert(tmp_path, data[:length])
        assert (done.status, done.error["error"]) == (5, "bad-format"), length
    assert convert(tmp_path, data[:end]).status == 0


def test_a_migration_without_tags(tmp_path: Path) -> None:
    done = convert(tmp_path, migration(1, [], name="mach-virt.gat"))
    assert (done.status, done.error["error"]) == (5, "bad-format")
    assert "mte=on" in done.error["hint"]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=8)), max_size=3))
def test_hostile_migrations(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]]
) -> None:
    data = bytearray(migration(2, [(0, bytes(TAG_PAGE_BYTES)), (1, None)]))
    for at, value in edits:
        data[at : at + len(value)] = value
    done = convert(tmp_path_factory.getbasetemp(), bytes(data), name="migration")
    assert done.status in SNAPSHOT_OR_SAID


def test_merging_a_dump_that_was_cut(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "guest", seed=3)
    assert run("save", guest, "-o", tmp_path / "s").status == 0
    whole = core(memory=[(BASE, 64 * KIB, bytes(64 * KIB))])
    for length in (3, HEADER_BYTES, 100, len(whole) - 1):
        (tmp_path / "dump").write_bytes(whole[:length])
        words = ("--to", "core", "--merge", tmp_path / "dump", "-o", tmp_path / "x")
        done = run("convert", tmp_path / "s", *words, "--json")
        assert (done.status, done.error["error"]) == (5, "bad-format"), length
        assert not (tmp_path / "x").exists()
