"""How tags are read from anything: a live guest, a snapshot, a snapshot with its deltas.

Commands (`mtetool.flows`) ask here for tags in order of address, in bounded pieces, around what
cannot be copied. What a command does with them does not belong here, and nothing is printed.
"""
