"""The keys of JSON reports: those in the manual pages, compared with those of real reports.

A page has a section JSON, with a subsection for each schema (`.SS mtetool.save/1`), whose entries
(.TP) name keys: `.BR held_bytes ", " vms[].pid ", " missing " (missing ranges)"`. A list of rows of
a common kind is followed by the kind in parentheses; mtetool(1) has a subsection for each kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

MAN = Path(__file__).parent.parent / "man"
_KINDS = {"ranges": "Ranges", "missing ranges": "Missing ranges", "memslots": "Memslots"}
_ENTRY = re.compile(r"([a-z_.\[\]]+)(?: \(([a-z ]+)\))?")


def check_keys(document: Any) -> None:
    """Assert that a report has exactly the keys that its page documents."""
    schema = document["schema"]
    pages = documented()
    assert schema in pages, f"document {schema}: `.SS {schema}` in the section JSON of its page"
    page, keys = pages[schema]
    found = set(paths(document))
    for key in sorted(found - keys):
        raise AssertionError(
            f"document the key {key} of {schema}: add `.TP`, `.B {key}` and a sentence below"
            f" `.SS {schema}` in man/{page}"
        )
    for key in sorted(keys - found):
        if _could_be_in(key, found, document):
            raise AssertionError(
                f"man/{page} documents {key} of {schema}, and a report has no such key: write it"
                " always, as null where it does not apply, or take it out of the page"
            )


def _could_be_in(key: str, found: set[str], document: Any) -> bool:
    """Whether the object or list that holds `key` is in the report, and not empty."""
    parent, dot, _ = key.rpartition(".")
    if not dot:
        return True
    # An empty list, or null, shows nothing about its keys.
    return any(path.startswith(parent + ".") for path in found)


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a report: `missing`, `missing[].ipa`, ..."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{prefix}{key}"
            yield from paths(item, f"{prefix}{key}.")
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and "schema" in item:
                check_keys(item)  # a document of its own
                continue
            yield from paths(item, f"{prefix.removesuffix('.')}[].")


@cache
def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """For each schema, the name of its page and the keys documented there."""
    sections = {
        title: (page.name, text)
        for page in sorted(MAN.glob("*.1"))
        for title, text in _subsections(page.read_text())
    }
    kinds = {kind: frozenset(_keys(sections[title][1], {})) for kind, title in _KINDS.items()}
    return {
        schema: (page, frozenset(_keys(text, kinds)))
        for title, (page, text) in sections.items()
        for schema in title.split(", ")
        if "/" in schema
    }


def _subsections(page: str) -> Iterator[tuple[str, str]]:
    for section in re.split(r"^\.SH ", page, flags=re.MULTILINE):
        if section.startswith("JSON\n"):
            for part in re.split(r"^\.SS ", section, flags=re.MULTILINE)[1:]:
                title, _, text = part.partition("\n")
                yield title.replace("\\-", "-"), text


def _keys(text: str, kinds: dict[str, frozenset[str]]) -> Iterator[str]:
    for tag in re.findall(r"^\.TP\n\.(?:B|BR) (.*)$", text, flags=re.MULTILINE):
        plain = tag.replace('"', "").replace("\\%", "")
        for entry in re.sub(r" *, *", ",", plain.replace("  (", " (")).split(","):
            match = _ENTRY.fullmatch(entry.strip())
            assert match is not None, f"not the names of keys: {tag}"
            key, kind = match.groups()
            yield key
            for inner in kinds[kind] if kind else ():
                yield f"{key}[].{inner}"
