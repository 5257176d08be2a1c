"""Finding VMs and what can be learnt of them from outside: /proc, and QEMU's monitor."""
