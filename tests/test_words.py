"""Numbers with nouns, and foreign text made harmless."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

import mtetool
from mtetool.words import counted, printable, quoted

_SOURCES = sorted(Path(mtetool.__file__).parent.rglob("*.py"))
# Nouns that may follow only a number that is known beforehand: `{_RAM_PAGES} pages`.
_NOUNS = "pages|ranges|records|snapshots|processes|threads|vCPUs|VMs|granules|memslots|files"
_CONSTANT = re.compile(r"_?[A-Z][A-Z_]+|[\w.]*(?:page|size)_bytes|described\.vcpus")
# Always many, or limits that the caller broke.
_ALWAYS_MANY = {
    "len(regions)",
    "failed + untried",
    "n_granules",
    "self.n_granules",
    "header.chunk_granules",
}


def test_numbers_have_nouns() -> None:
    assert (counted(1, "page"), counted(0, "page"), counted(2, "page")) == (
        "1 page",
        "0 pages",
        "2 pages",
    )
    assert counted(1, "process", "processes") == "1 process"
    assert counted(4096, "process", "processes") == "4,096 processes"


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: path.stem)
def test_no_message_counts_by_itself(path: Path) -> None:
    """`f"{n} pages"` says "1 pages": messages use `counted(n, "page")`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                continue
            number = ast.unparse(value.value)
            if number in _ALWAYS_MANY or _CONSTANT.fullmatch(number) or "counted(" in number:
                continue
            assert not re.match(rf" ({_NOUNS})\b", str(after.value)), number + str(after.value)


def test_printable_text_is_one_line_of_it() -> None:
    assert printable("Träume 梦.emu") == "Träume 梦.emu"
    assert printable("a\nb\x1b[2Jc\x9bd\u202ee\x7f") == r"a\nb\x1b[2Jc\x9bd\u202ee\x7f"
    assert printable(os.fsdecode(b"a\xff\x80b")) == r"a\xff\x80b"
    assert printable("\ud800") == r"\ud800"
    assert printable(printable("a\nb")) == printable("a\nb")


def test_quoted_text_is_short() -> None:
    assert quoted("a\nb") == r"'a\nb'"
    assert quoted("x" * 100) == "'" + "x" * 40 + "…'"
