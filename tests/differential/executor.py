"""Make calls on this machine's kernel for a host that compares the answers.

Each line of standard input is a list of calls, as JSON: `["copy_tags", 0, …]` is that method of
`Side`. The answers go to standard output, one list per line; the first line describes the
kernel. Each list of calls begins without VMs and with fresh memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from tests.differential.features import find_host
from tests.differential.real import RealSide


def main() -> None:
    """Serve until standard input ends."""
    side = RealSide()
    host = dataclasses.asdict(find_host(side))
    host["behaviours"] = [behaviour.value for behaviour in host["behaviours"]]
    print(json.dumps(host), flush=True)
    for line in sys.stdin:
        side.reset()
        answers = [getattr(side, name)(*words) for name, *words in json.loads(line)]
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
