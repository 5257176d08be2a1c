"""The conformance suite of all backends, on the real kernel."""

from __future__ import annotations

import re

import pytest

from tests.lab.machine import Machine

_SUITE = "cd /opt/mtetool && exec python3 -B -m pytest -p no:cacheprovider -q tests/conformance"


@pytest.mark.every_kernel
def test_kvm_backend_conforms_on_the_real_kernel(lab: Machine) -> None:
    result = lab.run(
        ["sh", "-c", f"{_SUITE} --backend kvm"],
        timeout=900,
        env={"MTETOOL_TEST_VMM": "/lab/testvmm"},
    )
    output = result.stdout.decode()
    print(output)
    assert result.returncode == 0, output[-8000:] + result.stderr.decode()
    passed = re.search(r"(\d+) passed", output)
    assert passed
    assert int(passed[1]) >= 20
    assert "skipped" not in output
