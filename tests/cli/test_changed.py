"""What a delta says about itself: its base, and how much has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.flows.save import SaveOptions, save
from mtetool.guest import Memslot
from mtetool.sources.layers import open_layers
from tests.cli.running import BASE, KIB, make_guest, run, set_tag
from tests.flows.fakes import PAGE, FakeGuest

RAM = (Memslot(0, BASE, 1024 * KIB),)


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("after", [0, 7])
def test_a_page_that_was_changed(tmp_path: Path, before: int, after: int) -> None:
    """Also in a guest with one tag, where the delta stores the tags and not the change."""
    guest = make_guest(tmp_path / "g", slots=RAM)
    set_tag(tmp_path / "g", BASE, 1024 * KIB, before)
    whole = run("save", guest, "-o", tmp_path / "whole", "--json").json
    assert (whole["base_id"], whole["changed_bytes"]) == (None, None)
    set_tag(tmp_path / "g", BASE, 4 * KIB, after)
    changed = 0 if before == after else 4 * KIB
    words = ("save", guest, "--base", tmp_path / "whole", "--force", "-o", tmp_path / "delta")
    saved = run(*words, "--json").json
    assert (saved["base_id"], saved["changed_bytes"]) == (whole["snapshot_id"], changed)
    size = "4 KiB" if changed else "0 bytes"
    line = f"it is a delta to the snapshot {whole['snapshot_id']}: the tags of {size} have changed"
    assert line in run(*words).out.splitlines()
    info = run("info", tmp_path / "delta", "--json").json
    assert (info["tagged_bytes"], info["tagged_pages"], info["changed_bytes"]) == (
        None, None, changed
    )  # fmt: skip
    text = run("info", tmp_path / "delta").out
    assert f"{size} since the base" in text
    assert "tagged" not in text
    assert run("verify", tmp_path / "delta").status == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_count_is_that_of_the_granules(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    n_pages = 12
    guest = FakeGuest((Memslot(0, BASE, n_pages * PAGE),), knows_untagged=True)
    pages = guest.memory[BASE].reshape(n_pages, 256)
    kinds = st.sampled_from(["zero", "one", "runs", "random"])
    random = np.random.default_rng(data.draw(st.integers(0, 99)))

    def retag(n: int) -> None:
        made = {
            "zero": np.zeros(256),
            "one": np.full(256, 9),
            "runs": np.repeat(random.integers(0, 16, 8), 32),
            "random": random.integers(0, 16, 256),
        }
        pages[n] = made[data.draw(kinds)]

    for n in range(n_pages):
        retag(n)
    directory = tmp_path_factory.mktemp("changed")
    with (directory / "whole").open("wb") as out:
        save(guest, out, SaveOptions(jobs=1))
    before = guest.memory[BASE].copy()
    for n in data.draw(st.sets(st.integers(0, n_pages - 1))):
        retag(n)
    with open_layers([str(directory / "whole")]) as base, (directory / "d").open("wb") as out:
        result = save(guest, out, SaveOptions(jobs=1), base=base)
    assert result.changed_bytes == int(np.count_nonzero(guest.memory[BASE] != before)) * 16
    assert run("info", directory / "d", "--json").json["changed_bytes"] == result.changed_bytes


def test_deltas_that_were_merged(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "g", 3, slots=RAM)
    names = [str(tmp_path / name) for name in "abc"]
    assert run("save", guest, "-o", names[0]).status == 0
    for number, name in enumerate(names[1:]):
        set_tag(tmp_path / "g", BASE + number * 64 * KIB, 64, 9 if number else 6)
        bases = [word for base in names[: number + 1] for word in ("--base", base)]
        assert run("save", guest, *bases, "-o", name).status == 0
    assert run("merge", *names[1:], "-o", tmp_path / "m").status == 0
    assert run("info", tmp_path / "m", "--json").json["changed_bytes"] in (128, None)
    assert run("verify", tmp_path / "m").status == 0
    assert run("merge", *names, "-o", tmp_path / "all").status == 0
    assert run("info", tmp_path / "all", "--json").json["changed_bytes"] is None
