"""Tests of the relay's transport, over real sockets, pipes, commands and TLS."""
