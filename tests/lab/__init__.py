"""The lab: a real arm64 Linux with KVM and MTE, booted under emulation in seconds.

`python -m tests.lab run -- COMMAND` runs a command there; `machine.Machine` does so for the
tests. The kernel's code is real; only the CPU is emulated.
"""
