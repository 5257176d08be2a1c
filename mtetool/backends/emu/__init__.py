"""Guests that are files, `emu:PATH`: for rehearsals, tests and hosts that are not arm64.

They answer as the kernel does, by the checks of `mtetool.emulator`; faults that a user orders are
kept next to the tags. Nothing here depends on the host's kernel.
"""
