"""`mtetool probe --selftest` on the real kernel, on a sound host and on one that loses tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtetool.flows.selftest import CHECK_IDS
from tests.lab.images import QEMU_7_2, images
from tests.lab.machine import Machine
from tests.lab.packages import LabUnavailableError

_IMPORTS = {"PYTHONPATH": "/opt/mtetool"}

# Measured after the first run: by then everything is loaded.
_WHAT_IS_LEFT = """
import json, os, resource
from mtetool.flows.selftest import selftest
from mtetool.vmm.host import host_facts
from mtetool.vmm.scratch import scratch_vm

def state():
    fds = [os.readlink(f'/proc/self/fd/{fd.name}') for fd in os.scandir('/proc/self/fd')
           if os.path.lexists(fd.path)]
    size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    return sorted(fds), size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

facts = host_facts()
assert selftest(facts, scratch_vm).passed
before = state()
for _ in range(5):
    assert selftest(facts, scratch_vm).passed
print(json.dumps([before, state()]))
"""


def _selftest(machine: Machine) -> tuple[int, Any]:
    result = machine.run(["mtetool", "probe", "--selftest", "--json"])
    assert result.stderr == b""
    return result.returncode, json.loads(result.stdout)


@pytest.mark.every_kernel(long=["6.12-16k", "7.3"])
def test_every_row_holds_on_the_real_kernel(lab: Machine) -> None:
    status, report = _selftest(lab)
    selftest = report["selftest"]
    assert {row["id"]: row["state"] for row in selftest["rows"]} == dict.fromkeys(CHECK_IDS, "ok")
    assert (selftest["passed"], selftest["not_run"], selftest["defects"]) == (True, None, [])
    assert (status, report["able"]) == (0, True)
    text = lab.run(["mtetool", "probe", "--selftest"], check=True).stdout.decode()
    assert f"selftest: {len(CHECK_IDS)} of {len(CHECK_IDS)} checks hold" in text


def test_it_leaves_nothing_and_takes_little(lab: Machine) -> None:
    output = lab.run(["python3", "-c", _WHAT_IS_LEFT], check=True, env=_IMPORTS).stdout
    before, after = json.loads(output)
    assert after[0] == before[0], "file descriptors"
    assert not [name for name in after[0] if "kvm" in name]
    # Python's own memory may grow a little; one leaked slot would be 64 KiB per check.
    assert after[1] - before[1] < 1 << 20
    assert after[2] - before[2] < 4 << 20


def test_the_examples_of_its_page(lab: Machine) -> None:
    page = (Path(__file__).parents[2] / "man" / "mtetool-probe.1").read_text()
    examples = page.partition(".EX\n")[2].partition(".EE\n")[0].replace("\\-", "-")
    assert examples.count("\nmtetool ") == 2
    lab.sh(f"set -e; cd /tmp; {examples}")
    assert json.loads(lab.get("/tmp/proof.json"))["selftest"]["passed"] is True


def test_without_dev_kvm_it_says_so(lab: Machine) -> None:
    lab.sh("mv /dev/kvm /dev/kvm.away")
    try:
        status, report = _selftest(lab)
        text = lab.run(["mtetool", "probe", "--selftest"]).stdout.decode()
    finally:
        lab.sh("mv /dev/kvm.away /dev/kvm")
    assert status == 4
    assert "/dev/kvm cannot be opened: ENOENT" in report["selftest"]["not_run"]
    assert {row["state"] for row in report["selftest"]["rows"]} == {"unknown"}
    assert "the selftest cannot run: /dev/kvm cannot be opened: ENOENT" in text


@pytest.mark.long
def test_qemu_7_2_as_the_host_is_recognised() -> None:
    try:
        found = images(emulator=QEMU_7_2)
    except LabUnavailableError as error:
        pytest.fail(f"THE LAB CANNOT RUN on QEMU 7.2: {error}")
    with Machine(images=found) as machine:
        status, report = _selftest(machine)
        text = machine.run(["mtetool", "probe", "--selftest"]).stdout.decode()
    selftest = report["selftest"]
    assert (status, report["able"], selftest["passed"]) == (4, False, False)
    assert [defect["id"] for defect in selftest["defects"]] == ["tags-overwrite-in-page"]
    wrong = [row["id"] for row in selftest["rows"] if row["state"] != "ok"]
    assert wrong == ["round-trip", "round-trip-pages"]
    assert "QEMU 7.2" in text
    assert "QEMU 8 or later" in text
