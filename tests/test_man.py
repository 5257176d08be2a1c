"""Every option is in a man page, and the pages render without warnings."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mtetool.cli import group
from mtetool.emulator import Behaviour
from mtetool.flows.probe import judge
from mtetool.flows.selftest import CHECK_IDS
from mtetool.flows.selftest_patterns import CHANGED, NOT_KEPT, OVERWRITE, OVERWRITE_IN_PAGE
from mtetool.permission import REASONS
from mtetool.vmm.host import host_facts

MAN = Path(__file__).parent.parent / "man"
PAGES = sorted(MAN.glob("*.[1-9]"))


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all commands, groups too."""
    yield path
    if isinstance(command, click.Group):
        context = context_of(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


def command_at(path: tuple[str, ...]) -> click.Command:
    command: click.Command = group
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(context_of(command), name)
        assert found is not None
        command = found
    return command


def context_of(command: click.Command) -> click.Context:
    """A context as the group's own: click keeps the names of the help option that it sees first."""
    return click.Context(command, help_option_names=["-h", "--help"])


def page_of(path: tuple[str, ...]) -> Path:
    """The command's own page; those of a group share the group's."""
    return MAN / f"{'-'.join(('mtetool', *path[:1]))}.1"


def words_of(page: Path) -> set[str]:
    text = page.read_text().replace("\\-", "-")
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


@pytest.mark.parametrize(
    "path", list(commands(group)), ids=lambda path: " ".join(path) or "mtetool"
)
def test_every_option_stands_in_a_page(path: tuple[str, ...]) -> None:
    command = command_at(path)
    page = page_of(path)
    words = words_of(page)
    options = [
        name
        for parameter in command.get_params(context_of(command))
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in (*parameter.opts, *parameter.secondary_opts)
    ]
    assert not [name for name in options if name not in words], page.name
    if path:
        assert path[-1] in page.read_text()


@pytest.mark.parametrize(
    "path", list(commands(group)), ids=lambda path: " ".join(path) or "mtetool"
)
def test_help_fits_on_a_screen(path: tuple[str, ...]) -> None:
    context = context_of(command_at(path))
    context.info_name, context.terminal_width = "x", 80
    lines = context.get_help().splitlines()
    assert len(lines) <= 40, f"{len(lines)} lines"
    assert f"{page_of(path).stem}(1)" in lines[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_pages_render_without_warnings(page: Path) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", str(page)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_pages_name_no_page_that_is_not_there() -> None:
    there = {page.name for page in PAGES}
    for page in PAGES:
        text = page.read_text().replace("\\-", "-")
        named = {f"{name}.{n}" for name, n in re.findall(r"(mte[a-z-]+) ?\(([1-9])\)", text)}
        assert named <= there, page.name


def test_stable_ids_stand_in_their_pages() -> None:
    def words(name: str) -> set[str]:
        return set(re.findall(r"[a-z]+(?:-[a-z]+)*", (MAN / name).read_text().replace("\\-", "-")))

    defects = {CHANGED.id, NOT_KEPT.id, OVERWRITE.id, OVERWRITE_IN_PAGE.id}
    rows = {row.id for row in judge(host_facts())}
    assert {*CHECK_IDS, *defects, *rows} <= words("mtetool-probe.1")
    assert set(REASONS) <= words("mtetool.1")
    page = (MAN / "mtetool-emu.1").read_text().replace("\\-", "-")
    assert [behaviour.value for behaviour in Behaviour if behaviour.value not in page] == []
