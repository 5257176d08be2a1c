"""Any value in any field of any kind of record: sound, or refused with status 5."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import Part, put_together, take_apart
from tests.fuzz.targets import read_snapshot
from tests.snapshot.forge import small_snapshot

_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.sampled_from([0, 1, 15, 16, 4096, 8192, 1 << 20, 1 << 47, (1 << 64) - 4096])
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_KINDS = sorted({part.kind for part in take_apart(small_snapshot()).parts})


def _maps(part: Part) -> list[dict[str, object]]:
    """The head, and the memslots in it."""
    assert isinstance(part.head, dict)
    return [part.head, *part.head.get("memslots", ())]


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(_KINDS),
    which=st.integers(0, 9),
    deep=st.integers(0, 9),
    field=st.integers(0, 99),
    value=_values,
    mend=st.booleans(),
)
def test_any_value_in_any_field(
    kind: bytes, which: int, deep: int, field: int, value: object, mend: bool
) -> None:
    snapshot = take_apart(small_snapshot())
    parts = [part for part in snapshot.parts if part.kind == kind]
    maps = _maps(parts[which % len(parts)])
    chosen = maps[deep % len(maps)]
    chosen[list(chosen)[field % len(chosen)]] = value
    read_snapshot(put_together(snapshot, mend=mend and kind not in (b"INDX", b"DONE")))


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(_KINDS), which=st.integers(0, 9), head=_values | st.binary(max_size=200)
)
def test_any_head(kind: bytes, which: int, head: object) -> None:
    snapshot = take_apart(small_snapshot())
    parts = [part for part in snapshot.parts if part.kind == kind]
    parts[which % len(parts)].head = head
    mend = kind not in (b"INDX", b"DONE")
    assert not read_snapshot(put_together(snapshot, mend=mend))


@settings(deadline=None, max_examples=100)
@given(which=st.integers(0, 9), payload=st.binary(max_size=400))
def test_any_payload(which: int, payload: bytes) -> None:
    snapshot = take_apart(small_snapshot())
    snapshot.parts[which % len(snapshot.parts)].payload = payload
    read_snapshot(put_together(snapshot))
