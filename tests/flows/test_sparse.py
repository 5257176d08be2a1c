"""Cost follows the tagged memory: a guest of a terabyte, and the same file either way."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.backends.emu.guest import EmulatedGuest, create_emulated, open_emulated
from mtetool.backends.emu.owner import Owner
from mtetool.flows.restore import RestoreOptions, restore
from mtetool.flows.save import SaveOptions, save
from mtetool.guest import GuestOptions, Memslot, Missing
from mtetool.snapshot.reader import SnapshotReader
from tests.flows.fakes import PAGE, FakeGuest

BASE = 0x4000_0000
TIB, GIB = 1 << 40, 1 << 30

_MEASURED = """
import re, sys
from pathlib import Path
from mtetool.__main__ import main
sys.argv[0] = "mtetool"
status = main()
# Not getrusage: that remembers the process that forked this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(int(peak) * 1024, file=sys.stderr)
sys.exit(status)
"""


def records(snapshot: bytes) -> list[object]:
    """Everything except the header, whose id and time differ."""
    return [
        piece
        if isinstance(piece, Missing)
        else (piece.ipa, piece.n_granules, piece.fill, piece._payload)
        for piece in SnapshotReader(io.BytesIO(snapshot), "test")
    ]


def saved(guest: EmulatedGuest | FakeGuest, *, every_page: bool) -> bytes:
    out = io.BytesIO()
    save(guest, out, SaveOptions(every_page=every_page))
    return out.getvalue()


@given(
    st.lists(st.tuples(st.integers(0, 127), st.integers(1, 40), st.integers(0, 15)), max_size=12)
)
def test_the_file_is_the_same_either_way(
    tmp_path_factory: pytest.TempPathFactory, stretches: list[tuple[int, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("guest") / "guest"
    slots = (Memslot(0, BASE, 64 << 20), Memslot(1, BASE + (128 << 20), 128 << 20))

    def fill(owner: Owner) -> None:
        for at, n_mib, tag in stretches:
            ipa = slots[at % 2].ipa + (at % 64 << 20)
            size_bytes = min(n_mib << 16, slots[at % 2].end - ipa)
            owner.set_tag(ipa, size_bytes, tag)

    create_emulated(str(path), memslots=slots, fill=fill)
    with open_emulated(str(path), GuestOptions()) as guest:
        assert records(saved(guest, every_page=False)) == records(saved(guest, every_page=True))


@pytest.mark.parametrize("every_page", [False, True])
def test_untagged_memory_is_only_written_where_it_was_tagged(every_page: bool) -> None:
    slots = (Memslot(0, BASE, 512 * PAGE),)
    source, target = FakeGuest(slots), FakeGuest(slots, knows_untagged=True)
    source.memory[BASE][: 4 * 256] = 7
    target.memory[BASE][300 * 256 : 302 * 256] = 9
    written: list[int] = []
    write_tags = target.write_tags

    def noting(ipa: int, tags: memoryview) -> int:
        written.extend(range(ipa, ipa + len(tags) * 16, PAGE))
        return write_tags(ipa, tags)

    target.write_tags = noting  # type: ignore[assignment,method-assign]
    snapshot = saved(source, every_page=False)
    result = restore(
        lambda: SnapshotReader(io.BytesIO(snapshot), "test"),
        target,
        RestoreOptions(every_page=every_page),
        again=True,
    )
    assert (result.status, result.restored_bytes) == (0, 512 * PAGE)
    assert result.verified_bytes == 512 * PAGE
    assert target.memory[BASE].tobytes() == source.memory[BASE].tobytes()
    untouched = set(range(BASE + 302 * PAGE, BASE + 512 * PAGE, PAGE)) - set(written)
    assert bool(untouched) is not every_page


def run(*words: str, ok: tuple[int, ...] = (0,)) -> tuple[str, int]:
    """Run a whole command; return its output, and its peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode in ok, done.stderr
    return done.stdout, int(done.stderr.splitlines()[-1])


@pytest.mark.long
def test_a_terabyte_with_a_gibibyte_that_is_tagged(tmp_path: Path) -> None:
    """Under 200 MiB of memory, and a file for the tagged part; the declared size costs nothing."""
    large, small, copy = (f"emu:{tmp_path / name}" for name in ("large", "small", "copy"))
    scattered = [BASE + n * 37 * GIB for n in range(16)]
    for guest, memory in ((large, TIB), (copy, TIB), (small, GIB)):
        run("emu", "create", guest.removeprefix("emu:"), "--memory", str(memory), "--quiet")
    for ipa in scattered:
        run("emu", "fill", large.removeprefix("emu:"), "heap", "--range", f"{ipa}:64M")
        run("emu", "fill", copy.removeprefix("emu:"), "random", "--range", f"{ipa + 5 * GIB}:4M")
    run("emu", "fill", small.removeprefix("emu:"), "heap")
    limit = 200 << 20
    file = str(tmp_path / "large.mtesnap")
    for words in (
        ("save", large, "-o", file, "--quiet"),
        ("verify", file),
        ("verify", file, "--against", large),
        ("restore", file, copy),
        ("diff", large, copy),
        ("diff", file, copy),
        ("dump", large, "--range", f"{scattered[3]}:1M"),
    ):
        _, peak = run(*words)
        assert peak < limit, words
    run("save", small, "-o", str(tmp_path / "small.mtesnap"), "--quiet")
    about_small = json.loads(run("info", str(tmp_path / "small.mtesnap"), "--json")[0])
    about_large = json.loads(run("info", file, "--json")[0])
    assert about_large["file_bytes"] < 1.2 * about_small["file_bytes"]
    # Tags of the copy that are not in the snapshot are gone; the rest was not written.
    assert (tmp_path / "copy").stat().st_blocks * 512 < 150 << 20
