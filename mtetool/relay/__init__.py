"""The relay in a migration: the ways between QEMU, one relay and the other.

`address` is what a user writes, `channels` opens it, `wire` frames what two relays say to each
other. Everything runs in one event loop of asyncio; nothing here knows QEMU's stream, or tags.
"""
