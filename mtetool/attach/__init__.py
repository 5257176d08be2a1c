"""Borrowing a thread of a live process to make system calls there, and giving it back unharmed.

The rule of this package: mtetool may be killed at any instant, and neither the process nor its
guest notices. It knows nothing of VMs; of tags only that ptrace can copy them. ARCHITECTURE.md
argues the design.
"""
