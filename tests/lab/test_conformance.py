"""The conformance suite of all backends, on the real kernel."""

from __future__ import annotations

import re

import pytest

from tests.lab.machine import Machine

_SUITE = "cd /opt/mtetool && exec python3 -B -m pytest -p no:cacheprovider -q tests/conformance"


@pytest.mark.every_kernel(long=["6.12-16k", "7.3"])
def test_kvm_backend_conforms_on_the_real_kernel(lab: Machine) -> None:
    _conforms(lab, "kvm", 0)


@pytest.mark.long
def test_proc_backend_conforms_on_the_real_kernel(lab: Machine) -> None:
    # Left out: the two tests that enable MTE, before and after the first vCPU.
    _conforms(lab, "proc", 2)


def _conforms(lab: Machine, backend: str, left_out: int) -> None:
    result = lab.run(
        ["sh", "-c", f"{_SUITE} --backend {backend}"],
        timeout=900,
        env={"MTETOOL_TEST_VMM": "/lab/testvmm", "MTETOOL_TEST_PROGRAM": "/lab/tagged"},
    )
    output = result.stdout.decode()
    print(output)
    assert result.returncode == 0, output[-8000:] + result.stderr.decode()
    passed = re.search(r"(\d+) passed", output)
    assert passed
    assert int(passed[1]) >= 20
    deselected = re.search(r"(\d+) deselected", output)
    assert (int(deselected[1]) if deselected else 0) == left_out
    assert "skipped" not in output
