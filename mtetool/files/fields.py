"""Record heads as msgpack maps: the one place that knows msgpack, and its traps.

msgpack silently keeps the last of duplicate keys, and fails with two families of exceptions;
neither gets out of this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgpack  # type: ignore[import-untyped]

from mtetool.errors import DamagedError, UnknownVersionError
from mtetool.words import encodable

MAX_TEXT_BYTES = 4096


def pack_map(values: Mapping[str, object]) -> bytes:
    """Pack a map, its keys in the given order."""
    return bytes(msgpack.packb(values, use_bin_type=True, strict_types=False))


def storable_text(text: str) -> str:
    """Text as a snapshot can hold it: no lone surrogates (odd file names), bounded."""
    data = encodable(text).encode()
    return data[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _once(pairs: Iterable[tuple[object, object]]) -> dict[object, object]:
    result: dict[object, object] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError("a key that is not a string")
        if key in result:
            raise ValueError(f"the key {key[:40]!r} twice")
        result[key] = value
    return result


def _shown(value: object) -> str:
    # repr() of lists that msgpack still decodes may exceed the interpreter's recursion limit.
    if isinstance(value, (list, dict)):
        return "an array" if isinstance(value, list) else "a map"
    return f"{value!r:.40}"


def unpack_map(data: bytes, where: str) -> Fields:
    """Unpack the map in `data`, which holds nothing else. Raises DamagedError."""
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True, object_pairs_hook=_once)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise DamagedError(f"{where} cannot be decoded: {error}") from error
    return Fields(value, where)


class Fields:
    """A decoded map, taken apart key by key, with each value's type and range checked.

    Every method raises DamagedError for a value that is absent or not as described.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise DamagedError(f"{where} is not a map")
        self._values: dict[str, object] = dict(value)
        self.where = where

    def _take(self, key: str) -> object:
        if key not in self._values:
            raise DamagedError(f"{self.where} has no {key!r}")
        return self._values.pop(key)

    def wrong(self, what: str) -> DamagedError:
        """The error for something impossible in this map."""
        return DamagedError(f"{self.where}: {what}")

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer with low ≤ value ≤ high; true and false are not integers."""
        value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(f"{key!r} is {_shown(value)}, not an integer from {low} to {high}")
        return value

    def integer_or_none(self, key: str, low: int, high: int) -> int | None:
        """As `integer`, or nil."""
        if self._values.get(key, 0) is None:
            del self._values[key]
            return None
        return self.integer(key, low, high)

    def integer_or_absent(self, key: str, low: int, high: int) -> int | None:
        """As `integer`; None where there is no such key."""
        return self.integer(key, low, high) if key in self._values else None

    def text(self, key: str) -> str:
        """A string of at most `MAX_TEXT_BYTES` bytes of UTF-8."""
        value = self._take(key)
        if not isinstance(value, str) or len(value.encode()) > MAX_TEXT_BYTES:
            raise self.wrong(f"{key!r} is not text of at most {MAX_TEXT_BYTES} bytes")
        return value

    def text_or_none(self, key: str) -> str | None:
        """As `text`, or nil."""
        if self._values.get(key, 0) is None:
            del self._values[key]
            return None
        return self.text(key)

    def truth_or_none(self, key: str) -> bool | None:
        """True, false or nil."""
        value = self._take(key)
        if value is not None and type(value) is not bool:
            raise self.wrong(f"{key!r} is not true, false or nil")
        return value

    def array(self, key: str) -> list[object]:
        """An array of anything."""
        value = self._take(key)
        if not isinstance(value, list):
            raise self.wrong(f"{key!r} is not an array")
        return value

    def end(self) -> None:
        """Raise UnknownVersionError for keys that were not read and that may matter."""
        unknown = [key for key in self._values if not key.startswith("x-")]
        if unknown:
            raise UnknownVersionError(
                f"{self.where} uses a feature that this mtetool does not know:"
                f" the key {unknown[0][:40]!r}",
                hint="update mtetool: a newer one wrote it",
            )
