"""A live migration with its tags: two relays sit in QEMU's migration stream, one on each host.

QEMU's side: `stream` looks at what passes, `placing` knows where it belongs. Tags: `outgoing` reads
them, `incoming` puts them in place, `payload` is their form. Between the relays: `address` and
`channels` lead there, `wire` is the conversation. `source` and `destination` are one migration.
"""
