"""What the commands do, a file each: from options that were checked to a result that is printed.

Nothing here parses a command line or prints; that is `mtetool.cli`. How a source is read is in
`mtetool.sources`.
"""
