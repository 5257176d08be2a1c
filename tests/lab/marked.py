"""Run in the lab: how much of a guest's memory may be tagged, with and without the kernel's marks.

`python3 -m tests.lab.marked KVM IPA SIZE` prints JSON: bytes and seconds for both.
"""

from __future__ import annotations

import json
import sys
import time

from mtetool.backends import open_guest
from mtetool.guest import Extent
from mtetool.vmm import pagemap


def main() -> None:
    """Measure both."""
    source, ipa, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    found: dict[str, float] = {}
    for name in ("marked", "existing"):
        with open_guest(source) as guest:
            guest.info()
            began = time.monotonic()
            found[name] = sum(part.size_bytes for part in guest.may_be_tagged(Extent(ipa, size)))
            found[f"{name}_seconds"] = round(time.monotonic() - began, 3)
        setattr(pagemap, "PageFlags", _no_frames)  # noqa: B010 - the module does not export it
    print(json.dumps(found))


def _no_frames() -> None:
    raise OSError


if __name__ == "__main__":
    main()
