"""JSON written in pieces equals the standard library's."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mtetool import streaming
from mtetool.streaming import Rows, json_parts

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=3), values, max_size=5)


@given(
    document=objects,
    arrays=st.dictionaries(st.text(max_size=3), st.lists(values, max_size=9), max_size=3),
    indent=st.none() | st.integers(0, 4),
    batch=st.integers(1, 4),
)
def test_pieces_are_as_the_whole(
    document: dict[str, Any], arrays: dict[str, list[Any]], indent: int | None, batch: int
) -> None:
    before, streaming._BATCH_ROWS = streaming._BATCH_ROWS, batch
    try:
        streamed = {**document, **{key: Rows(rows) for key, rows in arrays.items()}}
        parts = list(json_parts(streamed, indent))
    finally:
        streaming._BATCH_ROWS = before
    assert parts[0] == "{"
    assert "".join(parts) == json.dumps({**document, **arrays}, indent=indent)
