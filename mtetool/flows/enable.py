"""Turning MTE on for a guest that was started without it."""

from __future__ import annotations

from mtetool.guest import Guest


def enable(guest: Guest) -> bool:
    """Turn MTE on; return False if it was on already.

    Raises TooLateError once the VM has a vCPU (the kernel refuses from then on:
    arch/arm64/kvm/arm.c, kvm_vm_ioctl_enable_cap), MteUnsupportedError on a host without MTE.
    """
    return guest.enable_mte()
