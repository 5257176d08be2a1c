"""Processes with tagged memory of their own, `proc:PID`: the kernel's ptrace requests for tags.

Nothing here uses KVM.
"""
