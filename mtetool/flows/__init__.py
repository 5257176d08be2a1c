"""What the commands do, one file per command: from checked options to a result to print.

Nothing here parses a command line or prints: `mtetool.cli` does. Sources are read in
`mtetool.sources`.
"""
