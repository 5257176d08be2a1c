"""Guests of a live VMM, `kvm:PID`: copies by the real ioctl, made in the VMM by `mtetool.attach`.

This package has all that belongs to KVM: the copies, the memslots and where they lie in the VMM's
own memory (asked of the kernel if no monitor says so), the vCPUs, VMs that are about to be made,
domains of libvirt (`libvirt:DOMAIN`), and the list of all VMs. How to borrow a thread of another
process does not belong here.
"""
