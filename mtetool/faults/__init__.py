"""Injected faults: what they are, when they are due, and a guest that has them.

They stand in front of any guest, in memory; only `backends/emu` keeps them in a file.
"""
