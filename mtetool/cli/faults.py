"""Faults of emulated guests, as they are written and shown: `EFAULT,on=write,at=0x40010000`."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mtetool.cli.options import Parsed, parse_number, parse_range
from mtetool.cli.render import say, table
from mtetool.words import quoted

if TYPE_CHECKING:
    from mtetool.faults.model import Effect, Fault, Faults

_FORM = "EFFECT[,CONDITION=VALUE]..., such as EFAULT,on=read,at=0x40010000 or vanish,after=1000"
_TIME = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?(s|ms|us|ns)")
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_CHANCE = re.compile(r"[01](?:\.[0-9]{1,15})?")


def parse_fault(text: str) -> Fault:
    """Parse a fault of the command line; see mtetool-emu(1). Raises ValueError."""
    from mtetool.faults.model import Fault

    effect_text, *words = text.split(",")
    effect = _parse_effect(effect_text)
    conditions: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in _CONDITIONS:
            known = ", ".join(_CONDITIONS)
            raise ValueError(f"{quoted(word)} is not a condition ({known}): a fault is {_FORM}")
        if key in conditions:
            raise ValueError(f"{key}= is given twice: a fault is {_FORM}")
        try:
            conditions[key] = _CONDITIONS[key](value)
        except ValueError as error:
            raise ValueError(f"{key}=: {error}") from None
    return Fault(effect, **conditions)


def _parse_effect(text: str) -> Effect:
    from mtetool.faults.model import Fail, Vanish

    if text == "vanish":
        return Vanish()
    if text.startswith("slow="):
        return _parse_slowness(text.removeprefix("slow="))
    number = getattr(errno, text, None) if re.fullmatch("E[A-Z0-9]+", text) else None
    if isinstance(number, int):
        return Fail(number)
    raise ValueError(
        f"{quoted(text)} is not an effect (an errno by name, vanish, slow=1ms, slow=64M/s):"
        f" a fault is {_FORM}"
    )


def _parse_slowness(text: str) -> Effect:
    from mtetool.faults.model import Delay, Rate

    if text.endswith("/s"):
        return Rate(parse_number(text.removesuffix("/s")))
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"slow={quoted(text)} is neither the extra time for each page, such as 1ms or 250us,"
            " nor a rate in bytes of guest memory, such as 64M/s"
        )
    whole, fraction, unit = match.groups()
    size = _NANOSECONDS[unit]
    return Delay(int(whole) * size + int((fraction or "0").ljust(9, "0")) * size // 10**9)


def _parse_at(text: str) -> tuple[int, int]:
    if ":" in text:
        found = parse_range(text)
        return found.ipa, found.size_bytes
    return parse_number(text), 1


def _parse_on(text: str) -> str:
    if text not in ("read", "write"):
        raise ValueError(f"{quoted(text)} is neither read nor write")
    return text


def _parse_chance(text: str) -> float:
    if not _CHANCE.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not a probability such as 0.01")
    return float(text)


_CONDITIONS: dict[str, Callable[[str], Any]] = {
    "on": _parse_on,
    "at": _parse_at,
    "after": parse_number,
    "every": parse_number,
    "chance": _parse_chance,
    "seed": parse_number,
    "times": parse_number,
}

fault_option = click.option(
    "--fault",
    "faults",
    type=Parsed("fault", parse_fault),
    multiple=True,
    metavar="FAULT",
    help="A fault to rehearse, EFAULT,on=read,at=IPA (repeatable).",
)


def faults_json(faults: Faults) -> dict[str, Any]:
    """Return the keys `faults` and `vanished` of a report."""
    rows = [
        {"fault": str(fault), "fired": counted.fired, "spent": faults.is_spent(index)}
        for index, (fault, counted) in enumerate(zip(faults.ordered, faults.counted, strict=True))
    ]
    return {"faults": rows, "vanished": faults.vanished}


def say_faults(faults: Faults) -> None:
    """Print the faults for people; nothing where there are none."""
    if faults.vanished:
        say("vanished (an injected fault)")
    if faults.ordered:
        rows = [
            (str(fault), counted.fired, "spent" if faults.is_spent(index) else "")
            for index, (fault, counted) in enumerate(
                zip(faults.ordered, faults.counted, strict=True)
            )
        ]
        say(*table(("fault", "fired", ""), rows, right=("fired",)))
