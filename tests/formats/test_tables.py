"""Parquet tables, and what DuckDB makes of them."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from mtetool.formats import tables
from mtetool.guest import Extent, Memslot
from mtetool.snapshot.model import Header
from mtetool.snapshot.writer import SnapshotWriter
from tests.cli.running import BASE, KIB, make_guest, run

FLEET = Path(__file__).parents[2] / "examples" / "fleet.sql"
_PAGE = 4096


def snapshot(path: Path, guest: str, day: int, pages: dict[int, int], n_pages: int = 16) -> None:
    """Write a snapshot of a guest: the tags of whole pages by number, all others 0."""
    scope = Extent(BASE, n_pages * _PAGE)
    header = Header(
        page_size_bytes=_PAGE,
        memslots=(Memslot(0, BASE, scope.size_bytes),),
        scope=(scope,),
        source=f"kvm:{day}",
        created_utc=f"2026-03-{day:02}T06:00:00Z",
        tool="mtetool",
        kernel="6.12",
        machine="aarch64",
        vmm=None,
        name=guest,
        paused=True,
        snapshot_id=os.urandom(16).hex(),
    )
    tags = np.zeros((n_pages, _PAGE // 16), dtype=np.uint8)
    for page, tag in pages.items():
        tags[page] = tag
    with path.open("wb") as out, SnapshotWriter(out, header) as writer:
        writer.add_tags(BASE, tags.reshape(-1))
        writer.finish(consistent=True)


def query(directory: Path, number: int) -> list[Any]:
    """The rows of one of the example's queries, over the fleet in a directory."""
    text = FLEET.read_text().replace("'fleet/", f"'{directory}/fleet/")
    view, *queries = statements(text)
    with duckdb.connect() as base:
        base.execute(view)
        return base.execute(queries[number]).fetchall()


def statements(text: str) -> list[str]:
    """The statements of an example, without comments."""
    return [part for part in re.sub("--.*", "", text).split(";") if part.strip()]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a fleet."""
    return make_fleet(tmp_path_factory.mktemp("fleet"))


def make_fleet(directory: Path) -> Path:
    """Two guests on two days, one with a name that no directory could have."""
    snapshot(directory / "a1.mtesnap", "web/1 a=b", 1, {0: 3, 1: 3, 5: 7})
    snapshot(directory / "a2.mtesnap", "web/1 a=b", 2, {0: 3, 1: 3, 5: 8, 6: 9})
    snapshot(directory / "b1.mtesnap", "..", 1, {2: 1})
    snapshot(directory / "b2.mtesnap", "..", 2, {2: 1})
    files = sorted(directory.glob("*.mtesnap"))
    done = run("convert", *files[:3], "--to", "parquet", "-o", f"{directory}/fleet/", "--json")
    assert (done.status, done.json["rows"]) == (0, 4 + 5 + 3)
    # A day later one more comes.
    assert run("convert", files[3], "--to", "parquet", "-o", f"{directory}/fleet").status == 0
    return directory


def test_the_worst_tagged_guests(fleet: Path) -> None:
    assert query(fleet, 0) == [("..", 15 / 16, None), ("web/1 a=b", 12 / 16, None)]


def test_tags_that_never_change(fleet: Path) -> None:
    assert query(fleet, 1) == [
        ("web/1 a=b", BASE, 2 * _PAGE, 3),
        ("..", BASE + 2 * _PAGE, _PAGE, 1),
    ]


def test_growth_from_day_to_day(fleet: Path) -> None:
    rows = [(guest, str(day), tagged, growth) for guest, day, tagged, growth in query(fleet, 2)]
    assert rows == [
        ("..", "2026-03-01", _PAGE, None),
        ("..", "2026-03-02", _PAGE, 0),
        ("web/1 a=b", "2026-03-01", 3 * _PAGE, None),
        ("web/1 a=b", "2026-03-02", 4 * _PAGE, _PAGE),
    ]


def test_a_file_that_is_there_is_kept(fleet: Path) -> None:
    words = ("convert", fleet / "a1.mtesnap", "--to", "parquet", "-o", fleet / "fleet", "--json")
    done = run(*words)
    assert (done.status, done.error["error"]) == (2, "file-exists")
    assert run(*words, "--force").status == 0
    names = [path.name for path in (fleet / "fleet").rglob("*") if path.is_file()]
    assert len(names) == 4
    assert all(name.endswith(".parquet") for name in names)


def test_a_table_has_the_rows_of_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sources in one file, in groups that cut neither runs nor slots in two."""
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 100)
    monkeypatch.setattr(tables, "_BLOCK_GRANULES", 1000)
    guest = make_guest(tmp_path / "guest", seed=3)
    hole = f"EFAULT,on=read,at={BASE + 8 * KIB:#x}"
    broken = make_guest(tmp_path / "broken", seed=4)
    assert run("emu", "fault", tmp_path / "broken", "--fault", hole).status == 0
    table = tmp_path / "t.parquet"
    done = run("convert", guest, broken, "--to", "parquet", "-o", table, "--json")
    assert (done.status, done.json["missing_bytes"]) == (3, 4096)
    for name in (guest, broken):
        wanted = [
            (row["ipa"], row["size_bytes"], row.get("tag"))
            for key in ("runs", "missing")
            for row in run("dump", name, "--json").json[key]
        ]
        with duckdb.connect() as base:
            where = f"FROM '{table}' WHERE snapshot = '{name}' ORDER BY ipa"
            rows = base.execute(f"SELECT ipa, size_bytes, tag {where}").fetchall()
            slots = base.execute(f"SELECT DISTINCT slot FROM '{table}'").fetchall()  # noqa: S608
        assert rows == sorted(wanted)
        assert {slot for (slot,) in slots} == {0, 1, 2}


def test_no_table_is_left_by_an_error(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "guest", seed=3)
    (tmp_path / "bad").write_bytes(b"no snapshot")
    done = run("convert", guest, tmp_path / "bad", "--to", "parquet", "-o", tmp_path / "t")
    assert (done.status, (tmp_path / "t").exists()) == (5, False)


def test_names_of_partitions() -> None:
    saved = tables.Saved("a/../b", "x/y", tables.saved_at("2026-03-01T06:00:00Z"))
    assert (saved.partition, saved.file) == ("guest=a%2F..%2Fb/day=2026-03-01", "x%2Fy.parquet")
    unknown = replace(saved, guest=None, saved=tables.saved_at("yesterday"))
    assert unknown.partition == "guest=__HIVE_DEFAULT_PARTITION__/day=__HIVE_DEFAULT_PARTITION__"
