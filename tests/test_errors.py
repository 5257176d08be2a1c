"""The errors are an interface: unique ids, and statuses with one meaning each."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest

from mtetool import __main__ as program
from mtetool import errors


def classes(
    of: type[errors.MtetoolError] = errors.MtetoolError,
) -> Iterator[type[errors.MtetoolError]]:
    """All error classes of the package, however deep."""
    for kind in of.__subclasses__():
        if kind.__module__.startswith("mtetool."):
            yield kind
            yield from classes(kind)


# Use the module, so the class that it defines is among the others.
assert issubclass(program.InternalError, errors.MtetoolError)
CLASSES = sorted(set(classes()), key=lambda kind: kind.__name__)


def test_there_are_some() -> None:
    assert len(CLASSES) > 25


def test_ids_are_unique() -> None:
    ids = [kind.id for kind in CLASSES]
    assert sorted(set(ids)) == sorted(ids)
    assert errors.MtetoolError.id not in ids


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each(kind: type[errors.MtetoolError]) -> None:
    assert "id" in vars(kind), "the id is inherited"
    assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", kind.id)
    assert kind.status in (*range(2, 7), 128 + signal.SIGINT)
    assert kind.__doc__
    assert kind.__doc__ != kind.__mro__[1].__doc__
    assert kind.__name__.endswith("Error")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_status_is_that_of_the_family(kind: type[errors.MtetoolError]) -> None:
    family = [base for base in kind.__mro__ if base in CLASSES][-1]
    assert kind.status == family.status


def test_what_an_error_holds() -> None:
    error = errors.RangeError("no memory at 0x0", hint="look", ipa=0)
    assert (error.message, error.hint, error.details) == ("no memory at 0x0", "look", {"ipa": 0})
    assert str(error) == "no memory at 0x0"


def test_errno_names() -> None:
    assert errors.errno_name(14) == "EFAULT"
    assert errors.errno_name(9999) == "9999"
