"""What can be seen of a VMM and of this host from outside: /proc, page tables, QEMU's monitor.

All of it comes from strangers or from the kernel; everything is bounded and checked here. Nothing
here attaches to a process.
"""
