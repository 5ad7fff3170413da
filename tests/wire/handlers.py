"""Handlers of calls, and what else the tests of calls share."""

from __future__ import annotations

import asyncio
import os

from termite.wire.messages import (
    Message,
    ReadDir,
    StatusText,
)
from termite.wire.rpc import Connection, Reply

MIB = 1024 * 1024


def echo(conn: Connection, message: Message, body: bytes) -> Reply:
    """Answers with what it was given: the path as text, the body as it came."""
    assert isinstance(message, ReadDir)
    return Reply(StatusText(message.path), body)


async def never(conn: Connection, message: Message, body: bytes) -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False
