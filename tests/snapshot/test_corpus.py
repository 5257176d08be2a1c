"""A corpus of malicious files: every reader refuses each for what its name says.

Their checksums and counts are right, except for what is wrong with them.
"""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import pytest

from mtetool.errors import SnapshotError
from mtetool.snapshot.reader import Piece, SnapshotReader
from tests.cli.running import run
from tests.fuzz.targets import Restorer, read_snapshot

_CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.mtesnap"))


def _id_of(path: Path) -> str:
    """A name begins with the error's id."""
    ids = ("damaged", "truncated", "unknown-version", "not-a-snapshot")
    return next(known for known in ids if path.name.startswith(known))


def _read(path: Path) -> None:
    for piece in SnapshotReader(io.BytesIO(path.read_bytes()), "file"):
        if isinstance(piece, Piece) and piece.n_granules <= 1 << 20:
            piece.tags()


def test_there_are_files() -> None:
    assert len(_CORPUS) > 40


@pytest.mark.parametrize("path", _CORPUS, ids=lambda path: path.stem)
def test_refused_for_what_is_wrong(path: Path) -> None:
    with pytest.raises(SnapshotError) as caught:
        _read(path)
    assert (caught.value.id, caught.value.status) == (_id_of(path), 5)


@pytest.mark.parametrize("path", _CORPUS, ids=lambda path: path.stem)
def test_all_readers_agree(path: Path) -> None:
    assert not read_snapshot(path.read_bytes())


@pytest.mark.parametrize("path", _CORPUS, ids=lambda path: path.stem)
def test_nothing_is_written_to_a_guest(path: Path, tmp_path: Path) -> None:
    assert not Restorer(tmp_path)(path.read_bytes())


@pytest.mark.parametrize("path", _CORPUS, ids=lambda path: path.stem)
def test_commands_end_with_status_5(path: Path) -> None:
    assert run("verify", path).status == 5
    # `info` reads neither tags nor the heads of their records.
    assert run("info", path, "--json").status in (0, 5)


@pytest.mark.parametrize("path", _CORPUS, ids=lambda path: path.stem)
def test_memory_is_that_of_the_file_not_of_what_it_claims(path: Path) -> None:
    with pytest.raises(SnapshotError):
        _read(path)  # do not count what this imports and caches
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError):
            _read(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One read of a mebibyte, and the chunks of all files but one are below 64 KiB.
    assert peak_bytes < 4 << 20
