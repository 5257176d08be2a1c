"""The bench runs and writes its report, and its verdicts are the right way round."""

from __future__ import annotations

import os
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.bench.__main__ import main
from tests.bench.charts import BarPanel, document
from tests.bench.contenders import Material, Race
from tests.bench.model import (
    ACTIONS,
    MTETOOL,
    WAYS,
    ZSTD,
    ZSTD_MEMORY,
    Beside,
    Cell,
    Results,
    Run,
    Size,
    Start,
    Way,
)
from tests.bench.profile import main as profile
from tests.bench.profile import stage
from tests.bench.report import write
from tests.bench.running import BenchError, Worker
from tests.bench.sampling import Line, Sampler
from tests.bench.targets import targets

_GIB = 1 << 30
_SVG = "{http://www.w3.org/2000/svg}"


def test_a_run_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tool does every action; the files can be read."""
    words = ["--quick", "--sizes", "4M", "--patterns", "heap", "--rounds", "1"]
    assert main([*words, "--scratch", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    results = Results.read(out / "results.json")
    for action in ACTIONS:
        for way in WAYS:
            for tool in (MTETOOL, ZSTD, "lz4 -1", "cp"):
                cell = results.cell("heap", 4 << 20, action, way, tool)
                assert cell is not None, (action, way, tool)
                assert len(cell.runs) == 1
                assert 0 < cell.seconds < 60
                assert (cell.peak_bytes is None) == (way == "warm")
    assert {(scale.action, scale.jobs) for scale in results.scales} >= {("save", 1), ("save", 2)}
    assert results.size("heap", "packed", "xz -6") is not None
    for name in ("save", "restore", "scaling"):
        assert ET.parse(out / f"{name}.svg").getroot().tag == f"{_SVG}svg"  # noqa: S314
    # Nothing was left behind.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main(["--render", "--out", str(out)]) == 0
    assert (out / "results.md").read_text() == text


def test_a_busy_machine_gives_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.51, 0.0, 0.0))
    words = ["--sizes", "4M", "--patterns", "zero", "--rounds", "1", "--scratch", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "--force" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_profile_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("save", "restore", "verify"):
        words = ["--action", action, "--size", "64M", "--rounds", "2", "--scratch", str(tmp_path)]
        assert profile(words) == 0
        assert f"{action} of kernel, 4 MiB of tags" in capsys.readouterr().out


def _line(module: str, text: str) -> Line:
    return Line(module, "function", 1, text)


def test_a_profile_knows_the_stages() -> None:
    """The innermost line that matches counts; a thread that waits is not working."""
    save = _line("mtetool.flows.save", "writer.add_tags(step.ipa, step.tags)")
    frame = _line("mtetool.snapshot.frames", "return context.compress(room)")
    library = _line("somewhere.else", "pread()")
    assert stage((library, frame, save)) == "compress"
    assert stage((_line("threading", "lock.acquire()"), frame, save)).startswith("handing over")
    assert stage((library,)) == "everything else"


def test_the_sampler_sees_who_works() -> None:
    def spin() -> None:
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            sum(range(100))

    with Sampler() as sampler:
        worker = threading.Thread(target=spin)
        worker.start()
        worker.join()
    spinning = [
        seconds
        for stack, seconds in sampler.spent.items()
        if any(line.function.endswith("<locals>.spin") for line in stack)
    ]
    # The last samples can find the thread gone, the first ones not there yet.
    assert 0.1 < sum(spinning) < 0.4


def test_a_wrong_result_stops_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(tmp_path, "heap", 1 << 20)
    material.make(1)

    monkeypatch.setattr(Race, "once", lambda *_: Run(1.0, 1.0, 1))
    material.empty_guest()
    with Worker() as worker, pytest.raises(BenchError, match="diff"):
        list(Race(tmp_path, worker, worker, worker).rounds(material, 1))


def _cell(memory: int, way: Way, tool: str, *seconds: float) -> Cell:
    return Cell("heap", memory, "save", way, tool, [Run(s, s, 1) for s in seconds])


def test_the_targets_compare_the_right_way_round() -> None:
    """Faster, smaller and sooner count as met; the faster zstd is the one to outrun."""
    results = Results({}, contended=False, sizes_memory_bytes=_GIB)
    results.cells = [
        _cell(4 * _GIB, "warm", MTETOOL, 1.0, 1.0, 9.0),
        _cell(4 * _GIB, "warm", ZSTD, 4.0, 4.0, 4.0),
        _cell(4 * _GIB, "warm", ZSTD_MEMORY, 2.0, 3.0, 3.0),
        _cell(4 * _GIB, "cold", MTETOOL, 2.0),
        _cell(4 * _GIB, "cold", ZSTD, 3.0),
        _cell(_GIB, "warm", MTETOOL, 1.0),
        _cell(_GIB, "warm", ZSTD, 3.0),
        _cell(_GIB, "cold", MTETOOL, 3.0),
        _cell(_GIB, "cold", ZSTD, 2.0),
    ]
    results.sizes = [
        Size("heap", "guest", MTETOOL, 80),
        Size("heap", "raw", "zstd -1", 100),
        Size("heap", "raw", "xz -6", 80),
    ]
    results.starts = [
        Start("python -c pass", [0.010, 0.010, 0.500]),
        Start("mtetool --help", [0.069, 0.071, 0.068]),
        Start("mtetool info FILE", [0.080, 0.090, 0.010]),
    ]
    results.lab = [
        Beside("save", _GIB, [(1.09, 1.0), (1.3, 1.0), (1.0, 1.0)]),
        Beside("restore", _GIB, [(2.22, 2.0)]),
    ]
    assert [(row.what, row.measured, row.met) for row in targets(results)] == [
        ("save of a live guest, 1 GiB, in the lab", "1.09 times", True),
        ("restore of a live guest, 1 GiB, in the lab", "1.11 times", False),
        ("save, warm, heap, 1 GiB", "3.00 times", True),
        ("save, warm, heap, 4 GiB", "2.00 times", False),
        ("save, cold, heap, 4 GiB", "1.50 times as fast", True),
        ("file, heap, 1 GiB", "0.80 times", False),
        ("file, heap, 1 GiB", "1.00 times", None),
        ("`mtetool --help`", "59 ms more", True),
        ("`mtetool info FILE`", "70 ms more", False),
    ]


def test_what_the_lab_said_is_reported_and_kept(tmp_path: Path) -> None:
    results = Results({}, contended=False, lab=[Beside("save", _GIB, [(1.5, 1.0), (3.0, 1.5)])])
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    text = write(results, tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| save, 1 GiB")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["save, 1 GiB", "2.25 s", "1.25 s", "1.75", "1.50 to 2.00"]
    root = ET.parse(tmp_path / "lab.svg").getroot()  # noqa: S314
    assert len([r for r in root.iter(f"{_SVG}rect") if r.find(f"{_SVG}title") is not None]) == 2


def test_bars_are_as_long_as_their_values() -> None:
    panel = BarPanel("a < b", "ms", ["x", "y"], {"one": [1.0, 4.0], "two": [None, 0.0]})
    root = ET.fromstring(document("title & more", [panel]))  # noqa: S314
    bars = [rect for rect in root.iter(f"{_SVG}rect") if rect.find(f"{_SVG}title") is not None]
    heights = [float(rect.attrib["height"]) for rect in bars]
    assert len(bars) == 3
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)
    assert heights[2] == 0
