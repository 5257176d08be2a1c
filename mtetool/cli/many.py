"""Commands that take several files: each is done, whatever becomes of the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtetool.cli.render import print_json
from mtetool.errors import STATUS_OK, MtetoolError
from mtetool.streaming import Rows
from mtetool.words import printable

One = Callable[[str], tuple[int, dict[str, Any]]]
"""Reports on a file: prints it, or returns its JSON document; and returns the status."""


def each_of(files: Sequence[str], one: One, schema: str, *, as_json: bool) -> int:
    """Report on each file; the status is the largest of all.

    For a single file, an error is raised, and the document is printed as it is. For several, each
    error is reported in its file's place, and the documents are the list `files` of one document.
    """
    if len(files) == 1:
        status, document = one(files[0])
        if as_json:
            print_json(document)
        return status
    worst = STATUS_OK

    def documents() -> Iterator[dict[str, Any]]:
        nonlocal worst
        for file in files:
            try:
                status, document = one(file)
            except MtetoolError as error:
                status, document = error.exit_status, error.document()
                document["path"] = document["path"] or file
                if not as_json:
                    lines = [printable(line) for line in error.lines()]
                    lines[0] += "" if file in lines[0] else f" ({printable(file)})"
                    sys.stderr.write("\n".join(lines) + "\n")
            worst = max(worst, status)
            yield document

    if as_json:
        print_json({"schema": schema, "files": Rows(documents())})
    else:
        for _ in documents():
            pass
    return worst
