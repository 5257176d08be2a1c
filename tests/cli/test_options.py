"""Numbers, ranges, memslots and tags as people write them, and the shared options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from mtetool.cli.options import (
    MEMSLOT,
    RANGE,
    SIZE,
    TAG,
    guest_options,
    output_option,
    parse_memslot,
    parse_number,
    parse_range,
    parse_size,
    parse_tag,
    progress_options,
    report_option,
)
from mtetool.guest import Extent, GuestOptions, Memslot


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("010", 10),
        ("0x40000000", 0x40000000),
        ("0XfF", 255),
        ("64K", 65536),
        ("64k", 65536),
        ("2M", 2 << 20),
        ("1G", 1 << 30),
        ("3t", 3 << 40),
        ("0x10K", 16 << 10),
        ("18446744073709551615", (1 << 64) - 1),
        ("0" * 5000 + "1", 1),
    ],
)
def test_numbers(text: str, value: int) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", " 1", "1 ", "-1", "+1", "1_000", "1.5G", "0x", "x", "1KB", "1Ki", "٣", "0o7", "1e3", "K",
     "18446744073709551616", "16777216T", "0xffffffffffffffffff", "9" * 10000, "1\n"],
)  # fmt: skip
def test_no_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r"number|64 bits"):
        parse_number(text)


SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
NUMBERS = st.integers(0, (1 << 64) - 1)


@given(
    NUMBERS, st.sampled_from(sorted(SUFFIXES)), st.sampled_from(["d", "#x", "#X"]), st.booleans()
)
def test_every_way_to_write_a_number(value: int, suffix: str, form: str, lower: bool) -> None:
    shift = SUFFIXES[suffix]
    text = format(value >> shift, form) + (suffix.lower() if lower else suffix)
    assert parse_number(text) == value >> shift << shift


@given(st.text() | st.text("0123456789abcdefxXkKMGT_+-. :", max_size=24))
@example("1e3")
def test_any_text_is_a_number_or_a_value_error(text: str) -> None:
    for parse in (parse_number, parse_size, parse_tag, parse_range, parse_memslot):
        try:
            found = parse(text)
        except ValueError:
            continue
        assert text.isascii()
        assert not isinstance(found, int) or 0 <= found < 1 << 64


@given(NUMBERS, st.integers(1, (1 << 64) - 1))
def test_any_range_that_ends_within_64_bits(ipa: int, size_bytes: int) -> None:
    if ipa + size_bytes <= 1 << 64:
        assert parse_range(f"{ipa:#x}:{size_bytes}") == Extent(ipa, size_bytes)
    else:
        with pytest.raises(ValueError, match="64 bits"):
            parse_range(f"{ipa:#x}:{size_bytes}")


def test_sizes() -> None:
    assert parse_size("4K") == 4096
    with pytest.raises(ValueError, match="0 bytes"):
        parse_size("0")


def test_ranges() -> None:
    assert parse_range("0x40000000:64K") == Extent(0x40000000, 65536)
    assert parse_range("0xfffffffffffff000:4K") == Extent((1 << 64) - 4096, 4096)
    for bad in ("0x1000", "0x1000:", ":4K", "0:0", "0xfffffffffffff000:8K", "1:2:3", "1-2"):
        with pytest.raises(ValueError, match=r"."):
            parse_range(bad)


def test_memslots() -> None:
    assert parse_memslot("0:4K") == Memslot(0, 0, 4096, None)
    assert parse_memslot("0:4K:ro") == Memslot(0, 0, 4096, True)
    at = Memslot(0, 0, 4096, None, host_address=0x7F00_0000_0000)
    assert parse_memslot("0:4K@0x7f0000000000") == at
    assert parse_memslot("0:4K@0x7f0000000000:ro") == replace(at, readonly=True)
    mistaken = ("0:4K@", "0:4K@x", "@0", "0:4K@0@0", "0:4K:ro@0", "0:4K@0xfffffffffffff800")
    for bad in ("0:4K:rw", "0:4K:", "0:4K:ro:ro", "ro", *mistaken):
        with pytest.raises(ValueError, match=r"."):
            parse_memslot(bad)


def test_tags() -> None:
    assert [parse_tag(text) for text in ("0", "15", "0xf", "0xA")] == [0, 15, 15, 10]
    # As dump shows them.
    assert [parse_tag(f"{tag:x}") for tag in range(16)] == list(range(16))
    for bad in ("16", "0x10", "-1", "g", "0f", "fK", "0K", ""):
        with pytest.raises(ValueError, match=r"."):
            parse_tag(bad)


@click.command()
@click.option("--size", type=SIZE)
@click.option("--range", type=RANGE)
@click.option("--slot", type=MEMSLOT)
@click.option("--tag", type=TAG)
def typed(**values: object) -> None:
    click.echo(repr(values))


@pytest.mark.parametrize("option", ["--size", "--range", "--slot", "--tag"])
def test_bad_values_are_usage_errors_that_name_the_option(option: str) -> None:
    result = CliRunner().invoke(typed, [option, "nonsense"])
    assert result.exit_code == 2
    assert option in result.output
    assert "'nonsense'" in result.output


def test_guest_options() -> None:
    found: list[GuestOptions] = []

    @click.command()
    @guest_options
    def command(guest_options: GuestOptions) -> None:
        found.append(guest_options)

    arguments = ["--memslot", "0:4K", "--memslot", "1G:1M:ro", "--qmp", "/run/q"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert CliRunner().invoke(command, []).exit_code == 0
    slots = (Memslot(0, 0, 4096, None), Memslot(1, 1 << 30, 1 << 20, True))
    assert found == [GuestOptions(slots, Path("/run/q")), GuestOptions()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "text"),
        (["--json"], "json"),
        (["--output", "json"], "json"),
        (["--output", "text", "--json"], "json"),
        (["--json", "--output", "text"], "json"),
        (["--output", "raw"], "raw"),
    ],
)
def test_output(arguments: list[str], expected: str) -> None:
    @click.command()
    @output_option("raw")
    def command(output: str) -> None:
        click.echo(output)

    assert CliRunner().invoke(command, arguments).output.strip() == expected


def test_report_option_has_two_forms() -> None:
    @click.command()
    @report_option
    def command(output: str) -> None:
        click.echo(output)

    assert CliRunner().invoke(command, ["--output", "raw"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "False auto"),
        (["-q"], "True none"),
        (["--quiet", "--progress", "json"], "True none"),
        (["--progress", "json"], "False json"),
    ],
)
def test_progress(arguments: list[str], expected: str) -> None:
    @click.command()
    @progress_options
    def command(quiet: bool, progress: str) -> None:
        click.echo(f"{quiet} {progress}")

    assert CliRunner().invoke(command, arguments).output.strip() == expected
