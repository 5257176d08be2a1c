"""The names of what a command reads, looked at before anything is opened."""

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

    Returns the files among them, those of emulated guests too. `instead` is the hint for a guest
    that is named where a snapshot is wanted. Raises SourceError for that, UsageError for standard
    input that is named twice, OutputIsInputError where standard output goes to one of the files.
    """
    for file in files:
        # A file may be called so: ./emu:x, or emu:x where there is one.
        if is_guest(file) and not os.path.lexists(file):
            raise SourceError(
                f"{file} is a guest, and a snapshot file is wanted",
                hint=(instead or _save)(file),
            )
    plain = [*files, *(source for source in sources if not is_guest(source))]
    if plain.count("-") > 1:
        raise UsageError(
            "standard input (-) can be only one of the files",
            hint="name the others, or use the shell's <(command)",
        )
    inputs = [*plain, *guest_files(*sources)]
    from mtetool.files.output import keep_standard_output_off

    keep_standard_output_off(inputs)
    return inputs


def _save(guest: str) -> str:
    return f"mtetool save {guest} -o FILE makes a snapshot of it"
