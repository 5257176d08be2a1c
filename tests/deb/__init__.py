"""The packages, tried as by a stranger: `make test-deb`, `make test-wheels`."""
