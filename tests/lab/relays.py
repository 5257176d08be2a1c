"""Live migrations in the lab: two QEMUs, and a relay beside each of them."""

from __future__ import annotations

import json
import re
import shlex
import time
from dataclasses import dataclass, field
from typing import Any

from tests.lab.guests import Check, Qemu, kill_vmms
from tests.lab.machine import Machine

INCOMING, OUTGOING, _BETWEEN = "/tmp/incoming", "/tmp/outgoing", "/tmp/between"
_EXEC = "mtetool exec --"
_ENDED = ("completed", "failed", "cancelled")
_PATIENCE_SECONDS = 400.0
CAPABILITIES = {"return-path": True}


@dataclass
class Migration:
    """A guest in a QEMU, and another QEMU that waits for it: in one lab machine, or in two."""

    lab: Machine
    other_lab: Machine | None = None
    """The destination's, if it is another."""
    memory: str = "128M"
    guest_options: str = "hammer.mib=4 hammer.pause=5"
    initrd: str = "/lab/hammer.cpio"
    extra: str = "-smp 2"
    capabilities: dict[str, bool] = field(default_factory=lambda: dict(CAPABILITIES))
    target_has_mte: bool = True
    target_listens: bool = True
    timed: bool = False
    """Let busybox's time(1) count what the relays use; see `usage`."""
    n_started: int = field(init=False, default=0)
    source: Qemu = field(init=False)
    target: Qemu = field(init=False)

    def __post_init__(self) -> None:
        """Start both; the guest runs."""
        self.prepare()
        self.source, self.target = self.start_qemu(self.lab), self.new_target()
        self.source.wait_for(b"TAGGER ready")
        self.source.wait_for_checks(1)
        self.allow(self.source)

    def prepare(self) -> None:
        """Remove whatever is left of another migration."""
        for lab in (self.lab, self.target_lab):
            kill_vmms(lab)
            lab.sh(f"rm -f {INCOMING} {OUTGOING} {_BETWEEN} /tmp/relay-* /tmp/vm*.qmp")

    @property
    def target_lab(self) -> Machine:
        """The machine of the destination."""
        return self.other_lab or self.lab

    def start_qemu(self, lab: Machine, extra: str = "", wrapper: str = _EXEC) -> Qemu:
        """Start a QEMU with this guest's machine, and `extra` options."""
        self.n_started += 1
        made = Qemu(
            lab,
            f"vm{self.n_started}",
            mte=False,
            memory=self.memory,
            guest_options=self.guest_options,
            initrd=self.initrd,
            extra=f"{self.extra} {extra}",
            wrapper=wrapper,
        )
        return made.start()

    def new_target(self) -> Qemu:
        """Start a QEMU that waits for the guest."""
        self.target_lab.sh(f"rm -f {INCOMING}")
        wrapper = _EXEC if self.target_has_mte else "env"
        target = self.start_qemu(self.target_lab, "-incoming defer", wrapper)
        if self.target_listens:
            self.allow(target)
            target.qmp("migrate-incoming", json.dumps({"uri": f"unix:{INCOMING}"}))
        return target

    def allow(self, qemu: Qemu) -> None:
        """Set the capabilities of the migration in one QEMU."""
        rows = [{"capability": name, "state": on} for name, on in self.capabilities.items()]
        qemu.qmp("migrate-set-capabilities", json.dumps({"capabilities": rows}))

    def start(self, way: str = "relays", to: str = "", options: str = "") -> None:
        """Start the migration: through "relays", or "direct", or through "socat"."""
        if way == "relays":
            self.start_relays(to, options)
        elif way == "socat":
            self.lab.sh(
                f"rm -f {OUTGOING}; socat UNIX-LISTEN:{OUTGOING} UNIX-CONNECT:{INCOMING} &"
                f" until [ -S {OUTGOING} ]; do sleep 0.1; done"
            )
        self.migrate(INCOMING if way == "direct" else OUTGOING)

    def migrate(self, path: str = OUTGOING) -> None:
        """Let QEMU migrate to the relay, or to another unix socket."""
        self.source.qmp("migrate", json.dumps({"uri": f"unix:{path}"}))

    def start_relays(self, to: str = "", options: str = "") -> None:
        """Start both relays, and wait until QEMU can connect.

        The source's starts the other one, or finds it, at `to`; by default at a unix socket.
        """
        if not to:
            self.run_relay("destination", f"listen:unix:{_BETWEEN}", f"unix:{INCOMING}")
        self.run_relay("source", f"listen:unix:{OUTGOING}", to or f"unix:{_BETWEEN}", options)
        ready = (
            f"until [ -S {OUTGOING} ] || [ -e /tmp/relay-source.status ]; do sleep 0.1; done;"
            f" [ -S {OUTGOING} ]"
        )
        # Two starts of Python, and both attach, while the guest hammers the one CPU.
        if self.lab.sh(f"timeout 300 sh -c '{ready}'", check=False, timeout=320).returncode:
            raise AssertionError(self.relay_output().decode())

    def run_relay(self, role: str, incoming: str, outgoing: str, options: str = "") -> None:
        """Start one relay, in the background."""
        words = f"mtetool relay {role} --from {incoming} --to {shlex.quote(outgoing)} --json"
        timed = f"busybox time -v -o /tmp/relay-{role}.time" if self.timed else ""
        become = shlex.quote(f"echo $$ >/tmp/relay-{role}.pid; exec {timed} {words} {options}")
        self._lab_of(role).sh(
            f"rm -f /tmp/relay-{role}.*;"
            f" (sh -c {become} >/tmp/relay-{role}.out 2>/tmp/relay-{role}.err;"
            f" echo $? >/tmp/relay-{role}.status) &"
        )

    def go_on(self) -> None:
        """Make the destination the next source, and start another destination."""
        assert self.other_lab is None
        self.lab.sh(f"kill -KILL {self.source.pid}")
        self.source, self.target = self.target, self.new_target()
        self.allow(self.source)

    def kill_relay(self, role: str) -> None:
        """Kill one relay."""
        self._lab_of(role).sh(f"kill -KILL $(cat /tmp/relay-{role}.pid)")

    def _lab_of(self, role: str) -> Machine:
        return self.lab if role == "source" else self.target_lab

    def state(self) -> dict[str, Any]:
        """Return what the source's QEMU says of the migration."""
        found: dict[str, Any] = json.loads(self.source.qmp("query-migrate"))
        return found

    def wait(self) -> dict[str, Any]:
        """Wait until QEMU says that the migration has ended; return what it says."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (found := self.state()).get("status") not in _ENDED:
            assert time.monotonic() < deadline, (found, self.relay_output())
            time.sleep(0.2)
        return found

    def reports(self) -> dict[str, dict[str, Any]]:
        """Wait until both relays have ended; return their reports."""
        return {role: self.report(role) for role in ("source", "destination")}

    def usage(self, role: str) -> tuple[float, int]:
        """Return the seconds of CPU time that a relay used, and the most memory that it had."""
        said = self._lab_of(role).get(f"/tmp/relay-{role}.time").decode()
        seconds = sum(float(found) for found in re.findall(r"time \(seconds\): ([\d.]+)", said))
        (kib,) = re.findall(r"Maximum resident set size \(kbytes\): (\d+)", said)
        return seconds, int(kib) << 10

    def report(self, role: str) -> dict[str, Any]:
        """Wait until one relay has ended; return its report."""
        assert self.status(role) == 0, self.relay_output()
        report: dict[str, Any] = json.loads(self._lab_of(role).get(f"/tmp/relay-{role}.out"))
        return report

    def status(self, role: str) -> int:
        """Wait until one relay has ended; return its exit status."""
        script = f"until [ -s /tmp/relay-{role}.status ]; do sleep 0.1; done"
        lab = self._lab_of(role)
        lab.sh(script, timeout=_PATIENCE_SECONDS)
        return int(lab.get(f"/tmp/relay-{role}.status"))

    def relay_output(self) -> bytes:
        """Return what the relays wrote to their standard errors."""
        labs = dict.fromkeys((self.lab, self.target_lab))
        return b"".join(lab.sh("tail -n 20 /tmp/relay-* || true").stdout for lab in labs)

    def checks(self, count: int = 3) -> list[Check]:
        """Wait for checks of the guest at the destination; return them."""
        return self.target.wait_for_checks(count)
