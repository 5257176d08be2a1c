"""The companion service: root's help for VMMs that are started without the right to get MTE.

Under libvirt a VMM runs as a user who may neither read its seccomp filter nor trace it. Before it
becomes the VMM, a process asks this service, which then does what `mtetool exec` does: it watches
the start, and has the new VM's own thread enable MTE. `client` asks (and is the emulator wrapper),
`listening` has the socket, `service` accepts, `serving` is the process that serves one client.

Everyone on the host may connect, so nothing a client says is believed. What the service can be made
to do, and what bounds it, is in mtetool-companion(1), SECURITY.
"""
