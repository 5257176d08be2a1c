"""Read tags from any source: a live guest, a snapshot, a snapshot with its deltas.

Commands (`mtetool.flows`) get tags here in order of address, in bounded pieces, around memory that
cannot be copied. What a command does with them does not belong here, and nothing is printed.
"""
