"""Makes calls on this machine's kernel for a host that compares the answers.

On standard input one list of calls a line, as JSON: `["copy_tags", 0, …]` is that method of
`Side`. On standard output the list of their answers. The first line out says what kind of
kernel it is. Each list begins on a kernel without VMs and with fresh memory.
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
