"""One fuzzing process: libFuzzer's options on its command line, and directories of inputs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(
    include=[
        "mtetool.files",
        "mtetool.snapshot",
        "mtetool.sources",
        "mtetool.flows",
        "mtetool.relay",
    ]
):
    from tests.fuzz.targets import Restorer, follow_stream, read_emulated_guest, read_snapshot

from tests.fuzz.mutate import mutate
from tests.snapshot.forge import small_snapshot

_GOLDEN = Path(__file__).parents[1] / "snapshot" / "golden"
_SOUND = [small_snapshot(), *(path.read_bytes() for path in sorted(_GOLDEN.glob("*")))]

# A restore touches files, so only one in so many inputs is restored; a stream is as slow.
_RESTORE_EVERY = 16


class _Counters:
    inputs = 0
    accepted = 0


def _custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    # Inputs that reach new code are mostly refused; every third one starts from a sound file.
    if seed % 3 == 0:
        data = _SOUND[seed // 3 % len(_SOUND)]
    return mutate(data, seed, max_size)


def main() -> None:
    """Run until libFuzzer is done."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        restorer = Restorer(Path(directory))

        def one(data: bytes) -> None:
            _Counters.inputs += 1
            _Counters.accepted += read_snapshot(data)
            if _Counters.inputs % _RESTORE_EVERY == 0:
                restorer(data)
                read_emulated_guest(data)
                follow_stream(data)
            if _Counters.inputs % 1000 == 0:
                print(f"accepted={_Counters.accepted}", flush=True)

        atheris.Setup(sys.argv, one, custom_mutator=_custom_mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
