"""Progress on standard error: a bar on a terminal, lines of JSON for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from mtetool.cli.latest import never_waiting, write_line

Advance = Callable[[int], None]
"""Called with the bytes of guest memory that were done since the last call."""

Details = Callable[[], Mapping[str, object]]
"""What else is to be shown, as keys and values of the JSON; "stage" goes into the bar."""

_INTERVAL_SECONDS = 1.0


@contextmanager
def progress(total_bytes: int | None, label: str, mode: str) -> Iterator[Advance]:
    """Show the progress of a task; `total_bytes` is None where it is unknown.

    `mode` is that of `--progress`: "auto" shows a bar where standard error is a terminal,
    "json" writes one line a second and one at the end, "none" nothing.
    """
    done = 0
    with shown(label, mode) as update:

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            update(done, total_bytes)

        update(0, total_bytes)
        yield advance


@contextmanager
def shown(
    label: str, mode: str, details: Details = dict
) -> Iterator[Callable[[int, int | None], None]]:
    """As `progress`, for callers that count: they pass the bytes done and the total.

    `details` is called in another thread, whenever progress is shown. The function yielded does
    not wait for the reader of standard error; the end does.
    """
    if mode == "json":
        with _lines(label, details) as update, never_waiting(update) as latest:
            yield latest
    elif mode == "auto" and sys.stderr is not None and sys.stderr.isatty():
        with _bar(label, details) as update, never_waiting(update) as latest:
            yield latest
    else:
        yield lambda done_bytes, total_bytes: None


@contextmanager
def _lines(label: str, details: Details) -> Iterator[Callable[[int, int | None], None]]:
    started = time.monotonic()
    state: tuple[int, int | None] = (0, None)
    due = started + _INTERVAL_SECONDS

    import json

    def write(now: float) -> None:
        done, total = state
        rate = done / max(now - started, 1e-6)
        left = None if total is None else total - done
        document = {
            "schema": "mtetool.progress/1",
            "label": label,
            "done_bytes": done,
            "total_bytes": total,
            "elapsed_seconds": round(now - started, 3),
            "bytes_per_second": round(rate),
            "remaining_seconds": round(left / rate, 1) if rate and left is not None else None,
            **details(),
        }
        write_line(json.dumps(document))

    def update(done_bytes: int, total_bytes: int | None) -> None:
        nonlocal state, due
        state = (done_bytes, total_bytes)
        now = time.monotonic()
        if now >= due:
            due = now + _INTERVAL_SECONDS
            write(now)

    yield update
    # Only after success: after a failure, the error is the last line.
    write(time.monotonic())


@contextmanager
def _bar(label: str, details: Details) -> Iterator[Callable[[int, int | None], None]]:
    from mtetool.cli.bar import Bar

    with Bar(label, lambda: str(details().get("stage", ""))) as bar:
        yield bar.update
