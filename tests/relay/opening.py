"""Channels for tests: pairs of them, and what can be heard at one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from mtetool.relay.address import Side, parse
from mtetool.relay.channel import Channel
from mtetool.relay.channels import DEFAULT, Opening, open_channel

_T = TypeVar("_T")


def run(test: Coroutine[Any, Any, _T], seconds: float = 30.0) -> _T:
    """Run the coroutine of a test, which must not hang."""

    async def bounded() -> _T:
        async with asyncio.timeout(seconds):
            return await test

    return asyncio.run(bounded())


async def opened(text: str, side: Side = Side.QEMU, opening: Opening = DEFAULT) -> Channel:
    return await open_channel(parse(text, side), opening)


async def all_of(channel: Channel) -> bytes:
    """Everything up to the end."""
    parts = []
    while part := await channel.read():
        parts.append(part)
    return b"".join(parts)


class Waiting:
    """An address that is listened at, in a task: `where` is how to connect to it."""

    def __init__(self, text: str, side: Side = Side.QEMU, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        self.where: asyncio.Future[str] = loop.create_future()
        opening = Opening(on_listening=self._heard, **settings)
        self.task = asyncio.create_task(opened(text, side, opening))

    def _heard(self, name: str) -> None:
        self.where.set_result(name.removeprefix("listen:"))


async def pair(text: str, side: Side = Side.QEMU) -> tuple[Channel, Channel]:
    """The two ends of a connection: the one that listened first."""
    waiting = Waiting(text, side)
    connected = await opened(await waiting.where, side)
    return await waiting.task, connected
