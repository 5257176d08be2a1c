"""The emulated kernel answers like real ones: see `tests/differential`.

The long comparison, call by call and on each kernel, is `make differential`; this one runs on each
kernel with `make lab-kernels`.
"""

from __future__ import annotations

import re

import pytest

from tests.lab.machine import Machine

_SUITE = "cd /opt/mtetool && exec python3 -B -m pytest -p no:cacheprovider -q tests/differential"


@pytest.mark.long
def test_answers_of_the_emulated_kernel_are_real_ones(lab: Machine) -> None:
    result = lab.sh(f"{_SUITE} --side real", timeout=900, check=False)
    output = result.stdout.decode()
    print(output)
    assert result.returncode == 0, output[-8000:] + result.stderr.decode()
    passed = re.search(r"(\d+) passed", output)
    assert passed
    assert int(passed[1]) >= 12
    assert "skipped" not in output
