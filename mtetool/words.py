"""Words of messages and reports: numbers with nouns, and other people's text made harmless."""

from __future__ import annotations

import re

_QUOTED_MAX = 40
_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTES_AS_TEXT = range(0xDC80, 0xDD00)  # what surrogateescape makes of bytes that are not UTF-8


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """Return `1 page` or `2 pages`; `plural` is for nouns where adding an s is not enough."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
    """Return `text` as one line, with control characters shown as `\\n` and `\\x1b`.

    Names of files, guests and processes come from other people: they must not look like a line
    of a report or reach the terminal as an escape sequence. A byte of a file name that is not
    UTF-8 is shown as `\\xff`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def encodable(text: str) -> str:
    """Make `text` encodable as UTF-8: bytes that were not UTF-8 are escaped as `\\xff`."""
    return _SURROGATE.sub(lambda found: _escaped(found[0]), text)


def quoted(text: str, most: int = _QUOTED_MAX) -> str:
    """Return what a user wrote, `printable` and in quotes; a long text is cut after `most`."""
    cut = text if len(text) <= most else text[:most] + "…"
    return f"'{printable(cut)}'"


def _escaped(character: str) -> str:
    if ord(character) in _BYTES_AS_TEXT:
        return f"\\x{ord(character) - 0xDC00:02x}"
    return repr(character)[1:-1]
