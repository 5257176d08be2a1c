"""libvirt in a lab machine, as Debian packages it, and domains with the lab's guests.

A test starts its own daemons: all processes are killed after each test. They begin with the
configuration that the packages have, whatever a test before has changed or left.

    host = Libvirt(lab).start()
    guest = Domain(host, "web", emulator="/usr/bin/qemu-mte").start()
    guest.wait_for_checks()
    host.virsh("suspend", guest.name)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from shlex import quote
from subprocess import CompletedProcess
from typing import Self
from uuid import uuid4

from tests.lab.guests import Tagger, kill_vmms
from tests.lab.machine import Machine

_SECONDS = 300.0  # after that it must be hung, however busy the machine is
QEMU = "/usr/bin/qemu-system-aarch64"

# Where the lab differs from Debian's default configuration: nowhere for one host. Two hosts share a
# kernel.
_TWO_HOSTS = {
    # A domain has the same UUID on both, and so would have one profile: when it ends on one host,
    # libvirt removes it from the kernel, and QEMU on the other is confined no more.
    "security_driver": '"none"',
    # Both would use the same control group, named after the domain.
    "cgroup_controllers": "[]",
}

_MARK = "LAB starts libvirt"
# What udev and systemd do on a Debian host. Each line may be repeated.
_PREPARE = f"""
set -e
[ -e /sys/fs/cgroup/cgroup.procs ] || mount -t cgroup2 cgroup /sys/fs/cgroup
[ -e /sys/kernel/security/lsm ] || mount -t securityfs security /sys/kernel/security
chgrp kvm /dev/kvm
chmod 660 /dev/kvm
chmod 1777 /tmp /dev/shm
# The kernel's log must have every denial.
echo 0 >/proc/sys/kernel/printk_ratelimit
echo '<5>{_MARK}' >/dev/kmsg
"""

# Keep what the packages have, once. Later: restore it.
_STATE = "etc/libvirt var/lib/libvirt var/log/libvirt"
_KEEP = f"""
cd /
[ -d /root/packaged ] || {{
    for own in {_STATE}; do
        mkdir -p /root/packaged/$own
        cp -a $own/. /root/packaged/$own
    done
}}
"""
_RESTORE = f"""
for own in {_STATE}; do
    rm -rf $own/*
    cp -a /root/packaged/$own/. $own
done
rm -rf run/libvirt
mkdir -p run/libvirt
"""

# Directories and processes of its own instead. /run/lab holds the lab's own disk.
_OWN = f"""
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs run /mnt
mkdir /mnt/lab
mount --move /run/lab /mnt/lab
mount --move /mnt /run
for own in {_STATE}; do mount -t tmpfs -o mode=755 own $own; done
"""

# The processes of an earlier test are dead, but its profiles and control groups are still there.
_FORGET = """
loaded=/sys/kernel/security/apparmor
cut -d' ' -f1 $loaded/profiles | grep -v // | while read -r name; do
    printf %s "$name" >$loaded/.remove
done
rm -rf etc/apparmor.d/libvirt/libvirt-* etc/apparmor.d/local/abstractions/libvirt-qemu
[ ! -d sys/fs/cgroup/machine ] || find sys/fs/cgroup/machine -depth -type d -exec rmdir {} \\;
"""
_CONFINE = """
cd /etc/apparmor.d
apparmor_parser --replace --write-cache usr.sbin.libvirtd usr.lib.libvirt.virt-aa-helper
cd /
"""
_LOCAL_RULES = "etc/apparmor.d/local/abstractions/libvirt-qemu"
_DAEMON_RULES = "etc/apparmor.d/local/usr.sbin.libvirtd"

# A daemon goes into the background when it has its sockets, and answers when it is ready.
_START = """
virtlogd --daemon --pid-file /run/libvirt/virtlogd.pid
libvirtd --daemon --pid-file /run/libvirt/libvirtd.pid
virsh -c qemu:///system version >&2 || { cat /var/log/libvirt/*.log >&2; exit 1; }
cat /run/libvirt/libvirtd.pid
"""
# Its log daemon stays.
_RESTART = "".join(line for line in _START.splitlines(True) if "virtlogd" not in line)

# What an administrator sets up once, so that root of one host may log in to the other.
_SSH = """
ifconfig lo up
grep -q host2 /etc/hosts || echo '127.0.0.1 host1 host2' >>/etc/hosts
mkdir -p -m 700 /root/.ssh
[ -e /root/.ssh/id_ed25519 ] || {
    ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
    cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
    printf 'StrictHostKeyChecking accept-new\nLogLevel ERROR\n' >/root/.ssh/config
    ssh-keygen -A >/dev/null
}
"""
_SSHD = "mkdir -m 755 /run/sshd\n/usr/sbin/sshd -f /dev/null -o UsePAM=no\n"
# The last process of a host is its first one, too: it has to reap what the others leave.
_STAY = """
echo READY
trap '' CHLD
exec sleep 1000000
"""

_DOMAIN = """\
<domain type='kvm'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='aarch64' machine='virt'>hvm</type>
    <kernel>/lab/Image</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>console=ttyAMA0 quiet rodata=off {guest_options}</cmdline>
  </os>
  <features><gic version='3'/></features>
  <cpu mode='host-passthrough'/>
  <devices>
    <emulator>{emulator}</emulator>
    <serial type='file'><source path='{console}'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
</domain>
"""


@dataclass
class Libvirt:
    """The libvirt daemon of a lab machine, with AppArmor's profiles enforced.

    `settings` are added to qemu.conf, `rules` to what AppArmor allows each domain, `daemon_rules`
    to what it allows the daemon, which has `environment` besides its own (`PATH=...`).
    """

    lab: Machine
    settings: Mapping[str, str] = field(default_factory=dict)
    rules: str = ""
    daemon_rules: str = ""
    environment: str = ""
    hostname: str = "lab"
    pid: int = field(init=False)

    @property
    def uri(self) -> str:
        """What virsh connects to."""
        return "qemu:///system"

    def path(self, path: str) -> str:
        """Return where the rest of the machine finds a file of this host."""
        return path

    def outer_pid(self, pid: int) -> int:
        """Return what the machine calls a process that this host calls `pid`."""
        return pid

    def start(self) -> Self:
        """Start the daemon as the packages configure it, and wait until it answers."""
        script = _PREPARE + f"hostname {self.hostname}\n" + _KEEP + _FORGET + self._script()
        self.pid = int(self.lab.sh(script, timeout=_SECONDS).stdout)
        return self

    def _script(self) -> str:
        rules = f"printf %s {quote(self.rules)} >{_LOCAL_RULES}\n" if self.rules else ""
        # Without any of a test before, which a profile in the cache may have.
        rules += f"printf %s {quote(self.daemon_rules)} >{_DAEMON_RULES}\n"
        start = _START.replace("\nlibvirtd ", f"\n{self.environment} libvirtd ")
        # By default it comes from the machine, and they are all alike.
        identity = _append("libvirtd.conf", {"host_uuid": f'"{uuid4()}"'})
        settings = _append("qemu.conf", self.settings)
        return _RESTORE + identity + settings + rules + _CONFINE + start

    def stop(self) -> None:
        """End the daemon; its domains go on."""
        self.lab.sh(f"kill {self.pid}; while kill -0 {self.pid} 2>/dev/null; do sleep 0.1; done")

    def restart(self) -> None:
        """End the daemon and start it again, as an upgrade of its package does."""
        self.stop()
        self.pid = int(self.lab.sh(_RESTART, timeout=_SECONDS).stdout)

    def virsh(
        self, *words: str, check: bool = True, timeout: float = _SECONDS
    ) -> CompletedProcess[bytes]:
        """Run a command of virsh for this host."""
        command = ["virsh", "-c", self.uri, *words]
        return self.lab.run(command, timeout=timeout, check=check, env={"LC_ALL": "C"})

    def denials(self) -> list[str]:
        """Return what AppArmor has denied since the start, as lines of the kernel's log."""
        log = self.lab.run(["dmesg"], check=True).stdout.decode()
        lines = log.rpartition(_MARK)[2].splitlines()
        return [line for line in lines if 'apparmor="DENIED"' in line]

    def forget_emulators(self) -> None:
        """Make libvirt probe each emulator again. Before `start`: it remembers them, too."""
        self.lab.sh("rm -rf /var/cache/libvirt/qemu/capabilities")


@dataclass
class Host(Libvirt):
    """A host of its own, as far as namespaces of mounts and processes go, with its own identity.

    `pid` is its first process. Root may log in to `host2` by ssh.
    """

    name: str = "host1"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.path('/run/libvirt/libvirt-sock')}"

    def path(self, path: str) -> str:
        return f"/proc/{self.pid}/root{path}"

    def run(self, *words: str, check: bool = True) -> CompletedProcess[bytes]:
        """Run a command on this host."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "--"]
        return self.lab.run([*enter, *words], timeout=_SECONDS, check=check)

    def outer_pid(self, pid: int) -> int:
        script = 'for s in /proc/[0-9]*/status; do grep -H "^NSpid:.*\t$1$" $s; done; true'
        lines = self.lab.run(["sh", "-c", script, "sh", str(pid)]).stdout.decode().splitlines()
        ours = self.lab.sh(f"readlink /proc/{self.pid}/ns/pid").stdout
        found = [int(line.split("/")[2]) for line in lines]
        return next(p for p in found if self.lab.sh(f"readlink /proc/{p}/ns/pid").stdout == ours)

    def _script(self) -> str:
        # By default it is the machine's, and no domain migrates to the host where it runs.
        identity = _append("libvirtd.conf", {"host_uuid": f'"{uuid4()}"'})
        settings = _append("qemu.conf", {**_TWO_HOSTS, **self.settings})
        sshd = _SSHD if self.name == "host2" else ""
        inside = "set -e\n" + _OWN + _RESTORE + identity + settings + _START + sshd + _STAY
        out = f"/tmp/{self.name}.out"
        return (
            f"{_SSH}\nunshare -m -p -f sh -c {quote(inside)} >{out} 2>&1 & host=$!\n"
            f"until grep -q READY {out}; do kill -0 $host || {{ cat {out} >&2; exit 1; }};"
            " sleep 0.1; done\n"
            "cat /proc/$host/task/$host/children\n"
        )


def _append(name: str, settings: Mapping[str, str]) -> str:
    text = "".join(f"{key} = {value}\n" for key, value in settings.items())
    return f"printf %s {quote(text)} >>etc/libvirt/{name}\n"


def two_hosts(lab: Machine, settings: Mapping[str, str] | None = None) -> tuple[Host, Host]:
    """Start two hosts on one machine; a domain can migrate between them.

    Each has its own processes, /run, /etc/libvirt, /var/lib/libvirt and /var/log/libvirt; `path`
    shows where they are. They share the rest.
    """
    first, second = (Host(lab, settings or {}, name=name) for name in ("host1", "host2"))
    return first.start(), second.start()


def warm(lab: Machine) -> None:
    """Leave compiled profiles and what QEMU can do in the caches, and nothing else."""
    Libvirt(lab).start().virsh("domcapabilities")
    kill_vmms(lab)
    lab.sh("set -e; cd /" + _FORGET + _RESTORE + "rm -rf root/packaged run/libvirt")


@dataclass
class Domain(Tagger):
    """A domain of libvirt, with the tagger or another guest.

    `emulator` is QEMU or what starts it, `devices` more XML.
    """

    host: Libvirt
    name: str
    emulator: str = QEMU
    memory_mib: int = 256
    vcpus: int = 1
    initrd: str = "/lab/guest.cpio"
    guest_options: str = ""
    devices: str = ""
    uuid: str = field(default_factory=lambda: str(uuid4()))

    def __post_init__(self) -> None:
        self.lab = self.host.lab

    @property
    def console(self) -> str:
        return self.host.path(self._log("console"))

    def _log(self, kind: str) -> str:
        return f"/var/log/libvirt/qemu/{self.name}-{kind}.log"

    def xml(self) -> str:
        """Its definition."""
        return _DOMAIN.format(
            name=self.name,
            uuid=self.uuid,
            memory_mib=self.memory_mib,
            vcpus=self.vcpus,
            initrd=self.initrd,
            guest_options=self.guest_options,
            emulator=self.emulator,
            console=self._log("console"),
            devices=self.devices,
        )

    def define(self) -> Self:
        """Make it known to libvirt, without starting it."""
        self.lab.put(f"/tmp/{self.name}.xml", self.xml().encode())
        self.host.virsh("define", f"/tmp/{self.name}.xml")
        return self

    def start(self) -> Self:
        """Define and start it."""
        self.define().host.virsh("start", self.name)
        return self

    def on(self, host: Libvirt) -> Self:
        """Return the same domain on another host, where it has migrated to."""
        return replace(self, host=host)

    @property
    def pid(self) -> int:
        """The PID of its QEMU."""
        inner = self.lab.get(self.host.path(f"/run/libvirt/qemu/{self.name}.pid"))
        return self.host.outer_pid(int(inner))

    @property
    def profile(self) -> str:
        """The name of its AppArmor profile."""
        return f"libvirt-{self.uuid}"

    def state(self) -> str:
        """Return what libvirt says its state is: "running", "paused", "shut off" ..."""
        return self.host.virsh("domstate", self.name).stdout.decode().strip()

    def log(self) -> str:
        """Return libvirt's log of it: QEMU's command line, and what QEMU printed."""
        return self.lab.get(self.host.path(f"/var/log/libvirt/qemu/{self.name}.log")).decode()
