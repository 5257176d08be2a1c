"""Checks of the names that a command reads, before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from mtetool.backends import guest_files, is_guest
from mtetool.errors import SourceError, UsageError


def check_inputs(
    files: Sequence[str] = (),
    sources: Sequence[str] = (),
    *,
    instead: Callable[[str], str] | None = None,
) -> list[str]:
    """Check the names of snapshots (`files`) and of guests or snapshots (`sources`).

    Returns the files among them, including those of emulated guests. `instead` makes the hint for
    a guest named in place of a snapshot. Raises SourceError for such a guest, UsageError for
    standard input named twice, OutputIsInputError where standard output goes to one of the files.
    """
    for file in files:
        # A file can have such a name: ./emu:x, or emu:x if it exists.
        if is_guest(file) and not os.path.lexists(file):
            raise SourceError(
                f"{file} is a guest, but a snapshot file is needed",
                hint=(instead or _save)(file),
            )
    plain = [*files, *(source for source in sources if not is_guest(source))]
    if plain.count("-") > 1:
        raise UsageError(
            "standard input (-) can be read only once",
            hint="name the other files, or use the shell's <(command)",
        )
    inputs = [*plain, *guest_files(*sources)]
    from mtetool.files.output import keep_standard_output_off

    keep_standard_output_off(inputs)
    return inputs


def _save(guest: str) -> str:
    return f"make a snapshot of it: mtetool save {guest} -o FILE"
