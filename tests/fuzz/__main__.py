"""`python -m tests.fuzz`: malicious snapshots, guided by the code that they reach.

Prints `fuzz executions=N findings=N accepted=N seed=S` at its end, and keeps the input of each
finding. Atheris (libFuzzer) guides it by coverage, in as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_WORKER = ("-m", "tests.fuzz.worker")
_COUNT = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
_ACCEPTED = re.compile(r"accepted=(\d+)")
_GOLDEN = Path(__file__).parents[1] / "snapshot" / "golden"
_CORPUS = Path(__file__).parents[1] / "snapshot" / "corpus"
# More than a reader may use for any input; Python and numpy themselves take about 100 MiB.
_MEMORY_MIB = 400


def main(argv: list[str] | None = None) -> int:
    """Run the fuzzer; return 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--executions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1, 1 << 31))  # noqa: S311
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for path in (*_GOLDEN.glob("*"), *_CORPUS.glob("*.mtesnap")):
            (corpus / path.name).write_bytes(path.read_bytes())
        runs = -(-arguments.executions // arguments.jobs)
        logs = [Path(scratch) / f"log{number}" for number in range(arguments.jobs)]
        workers = [
            _start(corpus, runs, arguments.seed + number, arguments.findings, log)
            for number, log in enumerate(logs)
        ]
        statuses = [worker.wait() for worker in workers]
        texts = [log.read_text(errors="replace") for log in logs]
    executions = sum(int(count) for text in texts for count in _COUNT.findall(text))
    accepted = sum(int(count) for text in texts for count in _ACCEPTED.findall(text)[-1:])
    findings = sum(1 for status in statuses if status)
    for text, status in zip(texts, statuses, strict=True):
        if status or not _COUNT.search(text):
            print(text[-6000:], file=sys.stderr)
    print(
        f"fuzz executions={executions} findings={findings} accepted={accepted}"
        f" seed={arguments.seed}"
    )
    return int(findings > 0 or executions < arguments.executions)


def _start(
    corpus: Path, runs: int, seed: int, findings: Path, log: Path
) -> subprocess.Popen[bytes]:
    findings.mkdir(exist_ok=True)
    words = [
        *(sys.executable, *_WORKER, str(corpus)),
        *(
            f"-runs={runs}",
            f"-seed={seed}",
            "-max_len=65536",
            "-print_final_stats=1",
            "-mutate_depth=2",
        ),
        *(f"-rss_limit_mb={_MEMORY_MIB}", "-timeout=30", f"-artifact_prefix={findings}/"),
    ]
    # To a file: a pipe that is not read would block the worker.
    with log.open("wb") as out:
        return subprocess.Popen(words, stdout=out, stderr=out)


if __name__ == "__main__":
    sys.exit(main())
