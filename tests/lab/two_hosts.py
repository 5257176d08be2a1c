"""Two lab machines with a network between them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.lab.images import DEFAULT_KERNEL
from tests.lab.machine import Cable, Machine
from tests.relay.authority import Authority

HERE, THERE = "10.0.0.1", "10.0.0.2"
CREDENTIALS = "/etc/pki/qemu"
"""Where both hosts have the certificates that QEMU and mtetool look for."""
_LOGIN = """
set -e
mkdir -p -m 700 /root/.ssh
printf 'StrictHostKeyChecking accept-new\\nLogLevel ERROR\\n' >/root/.ssh/config
ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
cat /root/.ssh/id_ed25519.pub
"""
_LET_IN = """
set -e
mkdir -p -m 700 /root/.ssh
cat >/root/.ssh/authorized_keys
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
mkdir -p -m 755 /run/sshd
/usr/sbin/sshd -f /dev/null -o UsePAM=no -o HostKey=/etc/ssh/ssh_host_ed25519_key
"""


class TwoHosts(NamedTuple):
    """The source's machine and the destination's."""

    here: Machine
    there: Machine

    def allow_ssh(self) -> None:
        """Let root of the source log in at the destination, as `there`, until `kill_vmms`."""
        _allow_ssh(self.here, self.there, f"{THERE} there")

    def allow_ssh_back(self) -> None:
        """Let root of the destination log in at the source, as `here`."""
        _allow_ssh(self.there, self.here, f"{HERE} here")

    def give_certificates(self, directory: Path) -> None:
        """Give each host a certificate, all by one authority, as QEMU wants them."""
        authority = Authority(directory / "authority")
        for machine, role, address in (
            (self.here, "client", HERE),
            (self.there, "server", THERE),
        ):
            made = authority.issue(directory / role, role, f"IP:{address}")
            for name in ("ca-cert.pem", f"{role}-cert.pem", f"{role}-key.pem"):
                machine.put(f"{CREDENTIALS}/{name}", (made / name).read_bytes(), 0o600)

    def mend(self) -> None:
        """Let the network work again, at whichever end it was cut."""
        for machine in self:
            assert machine.cable
            address = machine.cable.address
            machine.sh(f"ifconfig eth0 {address} netmask 255.255.255.0 up")


def _allow_ssh(user: Machine, host: Machine, entry: str) -> None:
    user.sh(f"grep -q '{entry}' /etc/hosts || echo {entry} >>/etc/hosts")
    key = user.sh(_LOGIN).stdout
    host.run(["sh", "-c", _LET_IN], stdin=key, check=True)


@contextmanager
def two_hosts(
    here: str = DEFAULT_KERNEL, there: str = DEFAULT_KERNEL, *, memory: str = "2G"
) -> Iterator[TwoHosts]:
    """Boot two machines with these kernels. Raises LabUnavailableError, MachineLostError."""
    with tempfile.TemporaryDirectory(prefix="mtetool-cable-") as name:
        ends = [Cable(Path(name), number) for number in (1, 2)]
        kernels = (here, there)
        machines = [
            Machine(kernel=kernel, cpus=1, memory=memory, cable=end)
            for kernel, end in zip(kernels, ends, strict=True)
        ]
        with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
            yield TwoHosts(*pool.map(stack.enter_context, machines))
