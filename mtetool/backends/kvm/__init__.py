"""Guests of a live VMM, `kvm:PID`: copies by the real ioctl, made in the VMM by `mtetool.attach`.

Here is what belongs to KVM: the copies, the memslots and where they lie in the VMM's own memory
(asked of the kernel, where no monitor says so), the vCPUs, VMs that are about to be made, and the
list of all VMs. How a thread of another process is borrowed does not belong here.
"""
