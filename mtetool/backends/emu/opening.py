"""Emulated guests as the commands open them: with the faults that they were given."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from mtetool.backends.emu.guest import open_emulated
from mtetool.errors import NoSuchProcessError
from mtetool.guest import Guest

if TYPE_CHECKING:
    from mtetool.guest import GuestOptions


def open_with_faults(path: str, options: GuestOptions) -> Guest:
    """Open the emulated guest kept in the file `path`, with the faults that it was given.

    Raises NoSuchProcessError, as for a VMM that ended, once a fault has made it vanish; and what
    `open_emulated` raises.
    """
    with ExitStack() as stack:
        guest: Guest = stack.enter_context(emulated := open_emulated(path, options))
        kept = emulated.owner.kept_faults()
        if kept is not None:
            # Imported here: it needs numpy, and hardly any guest has faults.
            from mtetool.faults.guest import FaultyGuest

            guest = stack.enter_context(FaultyGuest(emulated, kept=kept))
            if kept.read().vanished:
                raise NoSuchProcessError(
                    f"the guest emu:{path} vanished (an injected fault)",
                    hint=f"bring it back: mtetool emu fault {path} --clear",
                )
        stack.pop_all()
        return guest
