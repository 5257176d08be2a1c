"""Tags in the forms of other programs: ELF cores, raw bytes, QEMU's streams, tables.

Inputs become a `TagSource` (`opening`); outputs are written from any.
"""
