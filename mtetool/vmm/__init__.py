"""What can be seen of a VMM and of this host from outside: /proc, page tables, QEMU's monitor.

All of it is a stranger's word, or the kernel's; everything is bounded and checked here. Nothing
here attaches to a process.
"""
