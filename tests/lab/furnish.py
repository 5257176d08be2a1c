"""What package scripts and an installer would have done in the lab's root."""

from __future__ import annotations

import shutil
from pathlib import Path

_DIRECTORIES = (
    *("proc", "sys", "dev", "tmp", "root", "run/lab", "run/sshd", "with", "lab", "mnt"),
    *("opt/mtetool", "usr/local/bin"),
    *("var/cache/apparmor", "var/cache/libvirt/qemu", "var/lib/libvirt/qemu"),
    *("var/log/libvirt/qemu", "etc/apparmor.d/local/abstractions", "etc/libvirt/hooks"),
)
_UNUSED = (
    *("usr/share/doc", "usr/share/locale", "usr/share/man", "usr/lib/udev", "usr/share/info"),
    *("usr/lib/systemd", "usr/share/bash-completion", "usr/share/lintian", "var/run", "var/lock"),
)
# QEMU without KVM: each start of libvirt would ask it what it can do, for many seconds here.
_UNUSED_PROGRAMS = ("qemu-system-arm", "qemu-system-armel", "qemu-system-armhf")
_ALTERNATIVES = (("libblas.so.3", "blas"), ("liblapack.so.3", "lapack"))
# libvirt-qemu's number is Debian's, the same on all hosts; the others differ from host to host.
_USERS = """\
root:x:0:0:root:/root:/bin/sh
sshd:x:100:65534::/run/sshd:/usr/sbin/nologin
libvirt-qemu:x:64055:102:Libvirt Qemu,,,:/var/lib/libvirt:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUPS = """\
root:x:0:
tty:x:5:
kvm:x:102:
libvirt:x:103:
libvirt-qemu:x:64055:libvirt-qemu
nogroup:x:65534:
"""
OWNERS = """
set -e
cd /
[ "$(stat -c %u /usr)" = 0 ] || chown -Rh 0:0 usr etc lab var
chmod 711 var/lib/libvirt/images var/lib/libvirt/boot var/cache/libvirt var/cache/libvirt/qemu
chown libvirt-qemu:libvirt-qemu var/lib/libvirt/qemu
chmod 750 var/lib/libvirt/qemu
chmod 600 etc/libvirt/qemu.conf
"""
"""A script for root in the lab: whoever builds the image may not give files to other users."""


def furnish(tree: Path) -> None:
    """Complete a tree of unpacked packages."""
    for unused in _UNUSED:
        shutil.rmtree(tree / unused, ignore_errors=True)
    for program in _UNUSED_PROGRAMS:
        (tree / "usr" / "bin" / program).unlink(missing_ok=True)
    for directory in _DIRECTORIES:
        (tree / directory).mkdir(parents=True, exist_ok=True)
    libraries = tree / "usr" / "lib" / "aarch64-linux-gnu"
    for name, target in _ALTERNATIVES:
        if (libraries / target / name).exists() and not (libraries / name).exists():
            (libraries / name).symlink_to(f"{target}/{name}")
    for name in ("sh", "env"):
        if not (tree / "usr" / "bin" / name).exists():
            (tree / "usr" / "bin" / name).symlink_to("busybox")
    (tree / "var" / "run").symlink_to("/run")
    (tree / "etc" / "passwd").write_text(_USERS)
    (tree / "etc" / "group").write_text(_GROUPS)
    (tree / "etc" / "hosts").write_text("127.0.0.1 localhost lab\n")
