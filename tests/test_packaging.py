"""What the packages say agrees with the source; `make test-deb` and `make test-wheels` try them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mtetool import __version__, provenance
from mtetool.companion.installing import text_of
from mtetool.files.installed import installed
from mtetool.provenance import LIBRARIES
from tests.cli.running import run

_ROOT = Path(__file__).parents[1]
_PROJECT: dict[str, Any] = tomllib.loads((_ROOT / "pyproject.toml").read_text())
_SBOM: dict[str, Any] = json.loads((_ROOT / "sbom.cdx.json").read_text())
# The epoch is Debian's.
_EPOCHS = {"numpy": "1:"}


def _needed() -> dict[str, str]:
    """The libraries, each with its lower bound."""
    return dict(line.split(">=") for line in _PROJECT["project"]["dependencies"])


def test_the_version_is_the_same_everywhere() -> None:
    assert _PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mtetool.__version__"}
    debian = (_ROOT / "debian" / "changelog").read_text()
    assert debian.startswith(f"mtetool ({__version__}) ")
    headings = re.findall(r"(?m)^## (.*)$", (_ROOT / "CHANGELOG.md").read_text())
    released = [heading for heading in headings if heading != "Unreleased"]
    (date,) = re.findall(r"(?m)^ -- .*>  (.*)$", debian)[:1]
    assert released[0] == f"{__version__} ({parsedate_to_datetime(date):%Y-%m-%d})"


def test_debian_needs_the_same_libraries() -> None:
    control = (_ROOT / "debian" / "control").read_text()
    found = dict(re.findall(r"(?m)^ +python3-(\w+) \(>= ([^)]*)\)", control))
    wanted = {name: _EPOCHS.get(name, "") + bound for name, bound in _needed().items()}
    assert found == wanted
    built_with = control.partition("\nPackage:")[0]
    assert [name for name in wanted if f"python3-{name} <!nocheck>" not in built_with] == []
    assert set(LIBRARIES) == set(wanted)


def _licence(name: str) -> str:
    """What the installed library says: the first of its licences, in SPDX's words."""
    found = metadata.metadata(name)
    text = found["License-Expression"] or (found["License"] or "").splitlines()[:1]
    if not text:
        text = [c.rpartition(":: ")[2] for c in found.get_all("Classifier", []) if "License" in c]
    first = text if isinstance(text, str) else text[0]
    words = {"MIT License": "MIT", "BSD": "BSD-2-Clause", "Apache 2.0": "Apache-2.0"}
    return words.get(first, first.split(" AND ")[0])


def _names(references: Iterable[str]) -> set[str]:
    return {reference.removeprefix("pkg:pypi/") for reference in references}


def test_the_bill_of_materials_is_complete() -> None:
    direct = {
        part["name"]: row["value"].removeprefix(">=")
        for part in _SBOM["components"]
        for row in part["properties"]
        if row["name"] == "mtetool:versions"
    }
    assert direct == _needed()
    listed = {part["name"]: part["licenses"][0]["license"]["id"] for part in _SBOM["components"]}
    assert listed == {name: _licence(name) for name in listed}
    for row in _SBOM["dependencies"]:
        (name,) = _names([row["ref"]])
        lines = (metadata.requires(name) or []) if name != "mtetool" else _needed()
        plain = [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
        assert _names(row["dependsOn"]) == {word.lower() for word in plain}, name
    assert _names(row["ref"] for row in _SBOM["dependencies"]) == {"mtetool", *listed}


def test_every_tracked_file_is_in_the_source_distribution() -> None:
    rules = (_ROOT / "MANIFEST.in").read_text()
    grafted = set(re.findall(r"(?m)^(?:graft|recursive-include) (\S+)", rules))
    included = set(" ".join(re.findall(r"(?m)^include (.*)$", rules)).split())
    automatic = {"MANIFEST.in", "pyproject.toml", "setup.py"}
    tops = {path.name for path in _ROOT.iterdir() if _is_ours(path)}
    assert tops - grafted - included - automatic == set()


def _is_ours(path: Path) -> bool:
    """Whether it is not what some tool has left, as .gitignore lists it."""
    left = {".git", "PKG-INFO", "setup.cfg"}  # the last two are a source distribution's own
    ignored = {line.strip("/") for line in (_ROOT / ".gitignore").read_text().split()}
    return path.name not in {*left, *ignored} and not path.name.endswith(".egg-info")


@pytest.mark.parametrize("name", ["share/man", "share/bash", "share/zsh", "share/fish"])
def test_wheels_have_pages_and_completions(name: str) -> None:
    files = _PROJECT["tool"]["setuptools"]["data-files"]
    found = [path for key, globs in files.items() if key.startswith(name) for path in globs]
    assert all(list(_ROOT.glob(path)) for path in found)
    if name == "share/man":
        pages = {page for path in found for page in _ROOT.glob(path)}
        assert pages == {page for page in (_ROOT / "man").iterdir() if page.suffix[1:].isdigit()}
    else:
        # Each is what mtetool itself prints.
        (path,) = found
        shell = name.rpartition("/")[2]
        printed = subprocess.run(
            [sys.executable, "-m", "mtetool"],
            env={"_MTETOOL_COMPLETE": f"{shell}_source", "PYTHONPATH": str(_ROOT)},
            capture_output=True,
            check=True,
        )
        assert printed.stdout.strip() == (_ROOT / path).read_bytes().strip()


def test_debian_installs_every_file_that_is_shown() -> None:
    """But for the rule for libvirt's daemon, which the place of the filter makes superfluous."""
    rules = (_ROOT / "debian" / "rules").read_text()
    shown = set(re.findall(r"\$\(SHOW\) mtetool\.(\w+) (\S+) >", rules))
    there = {(path.parts[-3], path.name) for path in (_ROOT / "mtetool").glob("*/installed/*")}
    assert shown == there - {("relay", "apparmor")}


def test_debian_s_filters_are_where_libvirt_looks_and_may_execute() -> None:
    links = (_ROOT / "debian" / "mtetool-libvirt.links").read_text().split()
    names = {link: target for target, link in zip(links[::2], links[1::2], strict=True)}
    filters = {path: target for path, target in names.items() if path.startswith("usr/lib")}
    # libvirt's formats, without those that use no compressor.
    assert {Path(path).name for path in filters} == {"bzip2", "gzip", "lzop", "xz", "zstd"}
    assert {Path(target).parent for target in filters.values()} == {Path("usr/bin")}
    (path,) = re.findall(r"PATH=([^:]*):", installed("mtetool.relay", "unit"))
    assert {f"/{Path(name).parent}" for name in filters} == {path}


def test_the_unit_starts_the_package_s_command() -> None:
    assert "\nExecStart=/usr/bin/mtetool companion\n" in text_of("service", "/usr/bin/mtetool")


@pytest.mark.parametrize("words", [["--version", "-v"], ["-v", "--version"]])
def test_the_version_says_where_it_comes_from(words: list[str]) -> None:
    outcome = run(*words)
    first, second = outcome.out.splitlines()
    assert (outcome.status, first) == (0, f"mtetool {__version__}")
    assert second.startswith(f"source in {_ROOT / 'mtetool'}, C loops, Python 3.")
    for name in LIBRARIES:
        assert f", {name} {metadata.version(name)}" in second


def test_a_version_that_nobody_wrote_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.0.0" if name == "xxhash" else known(name)
    )
    assert ", xxhash of unknown version, " in provenance.line()


def test_v_alone_says_nothing() -> None:
    assert "-v goes with --version only" in run("-v", "list").err
