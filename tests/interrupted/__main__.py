"""`python -m tests.interrupted [--share SHARE] [--seed SEED] [RUN…]`: interrupt everything.

Prints a line per run of mtetool, `RUN interruptions=N came=N wrong=N`, and what was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.interrupted.campaign import Campaign, sample
from tests.interrupted.runs import RUNS


def main() -> int:
    """Run the campaign; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trial", default="")
    parser.add_argument("runs", nargs="*", metavar="RUN")
    asked = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as directory, Campaign(Path(directory) / "c") as campaign:
        for run in RUNS:
            if asked.runs and run.name not in asked.runs:
                continue
            whole, found = campaign.record(run)
            chosen = [
                one for one in sample(found, asked.share, asked.seed) if asked.trial in one.inject
            ]
            came, wrong = 0, 0
            for trial in chosen:
                hit, message = campaign.interrupt(run, trial, whole)
                came += hit
                if message:
                    wrong += 1
                    print(message, flush=True)
            failed += wrong
            print(f"{run.name} interruptions={len(chosen)} came={came} wrong={wrong}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
