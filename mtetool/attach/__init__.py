"""Borrow a thread of a live process to make system calls there, and give it back unharmed.

The rule of this package: mtetool may be killed at any instant, and neither the process nor its
guest notices. The package knows nothing about VMs, and about tags only that ptrace can copy them.
ARCHITECTURE.md gives the reasons for the design.
"""
