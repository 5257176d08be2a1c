"""A worker process: it runs operations again and again, with everything loaded.

It reads a line of JSON, an operation and its words, and writes one, the time that it took.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import zstandard

from tests.bench import lz4

_STEP = 4 << 20

Timed = Callable[[], None]


def _mtetool(*words: str) -> Timed:
    from mtetool.cli import group

    def command() -> None:
        status = group.main(list(words), prog_name="mtetool", standalone_mode=False)
        if status:
            raise ValueError(f"status {status}")

    return command


# --- zstd: from file to file, in a stream, as the program does it; and from buffer to buffer ---


@cache
def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=1, threads=2, write_checksum=True)


@cache
def _decompressor() -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor()


def _zstd_save(source: str, target: str) -> Timed:
    def save() -> None:
        with Path(source).open("rb", 0) as tags, Path(target).open("wb", 0) as out:
            size = os.fstat(tags.fileno()).st_size
            _compressor().copy_stream(tags, out, size, read_size=_STEP, write_size=_STEP)

    return save


def _zstd_save_memory(source: str, target: str) -> Timed:
    data = _loaded(source)

    def save() -> None:
        _compressor().compress(data)

    return save


def _zstd_restore(source: str, target: str) -> Timed:
    def restore() -> None:
        with Path(source).open("rb", 0) as frame, Path(target).open("wb", 0) as out:
            _decompressor().copy_stream(frame, out, read_size=_STEP, write_size=_STEP)

    return restore


def _zstd_verify(source: str, target: str) -> Timed:
    def verify() -> None:
        with Path(source).open("rb", 0) as frame:
            chunks = _decompressor().read_to_iter(frame, read_size=_STEP, write_size=_STEP)
            for _ in chunks:
                pass

    return verify


# --- lz4: from file to file, through buffers that are allocated already -------------------------


def _lz4_save(source: str, target: str) -> Timed:
    library = lz4.load()
    data = _buffer("in", Path(source).stat().st_size)
    out = _buffer("out", lz4.bound(library, len(data)))

    def save() -> None:
        _read(source, data)
        length = lz4.compress(library, data, out)
        with Path(target).open("wb", 0) as file:
            file.write(memoryview(out)[:length])

    return save


def _lz4_restore(source: str, target: str, n_bytes: str) -> Timed:
    library = lz4.load()
    data = _buffer("in", Path(source).stat().st_size)
    out = _buffer("out", int(n_bytes))

    def restore() -> None:
        _read(source, data)
        length = lz4.decompress(library, data, out)
        if length != len(out):
            raise ValueError(f"{length} bytes instead of {len(out)}")
        if target:
            with Path(target).open("wb", 0) as file:
                file.write(out)

    return restore


def _lz4_verify(source: str, n_bytes: str) -> Timed:
    return _lz4_restore(source, "", n_bytes)


# --- cp and cmp ---------------------------------------------------------------------------------


def _cp(source: str, target: str) -> Timed:
    def copy() -> None:
        shutil.copyfile(source, target)

    return copy


def _cmp(one: str, other: str) -> Timed:
    a, b = _buffer("one", _STEP), _buffer("other", _STEP)

    def compare() -> None:
        with Path(one).open("rb", 0) as left, Path(other).open("rb", 0) as right:
            while left.readinto(a):
                right.readinto(b)
                if a != b:
                    raise ValueError("the files differ")

    return compare


def _read(path: str, into: bytearray) -> None:
    left = memoryview(into)
    with Path(path).open("rb", 0) as file:
        while left:
            n_bytes = file.readinto(left)
            if not n_bytes:
                raise ValueError(f"{path} became shorter")
            left = left[n_bytes:]


def _loaded(path: str) -> bytearray:
    data = _buffer("in", Path(path).stat().st_size)
    _read(path, data)
    return data


# Buffers kept between runs, by purpose: the first run, which does not count, faults them in.
_kept: dict[str, bytearray] = {}


def _buffer(purpose: str, n_bytes: int) -> bytearray:
    kept = _kept.get(purpose)
    if kept is None or len(kept) != n_bytes:
        _kept.pop(purpose, None)
        kept = _kept[purpose] = bytearray(n_bytes)
    return kept


_OPERATIONS: dict[str, Callable[..., Timed]] = {
    "mtetool": _mtetool,
    "zstd save": _zstd_save,
    "zstd save in memory": _zstd_save_memory,
    "zstd restore": _zstd_restore,
    "zstd verify": _zstd_verify,
    "lz4 save": _lz4_save,
    "lz4 restore": _lz4_restore,
    "lz4 verify": _lz4_verify,
    "cp": _cp,
    "cmp": _cmp,
}


def _measured(operation: str, *words: str) -> dict[str, float]:
    timed = _OPERATIONS[operation](*words)
    gc.collect()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    timed()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu}


def main() -> None:
    """Serve until standard input ends."""
    # Discard what the operations print.
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    for line in sys.stdin:
        try:
            answer: dict[str, object] = dict(_measured(*json.loads(line)))
        except Exception as error:  # noqa: BLE001
            answer = {"error": f"{type(error).__name__}: {error}"}
        with suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)
