"""Messages become bytes and bytes become messages, strictly.

A wrong, missing or extra field, a wrong type, an unknown tag or a trailing byte is a `WireError`
that names message and field.  The set of messages is whatever `wire/messages.py` defines; its
array-like structs are parts of messages and never travel alone.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec

from termite.errors import WireError
from termite.wire import messages
from termite.wire.messages import Message

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

MESSAGES: dict[str, type[Message]] = {
    name: found
    for name, found in vars(messages).items()
    if isinstance(found, type)
    and issubclass(found, Message)
    and found is not Message
    and not found.__struct_config__.array_like
}

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Union[tuple(MESSAGES.values())]).decode  # noqa: UP007 (the set is computed)


def encode(message: Message) -> bytes:
    try:
        data = _encode(message)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as exc:
        raise WireError(f"cannot encode {type(message).__name__}: {exc}") from exc
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"{type(message).__name__} of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes | bytearray | memoryview) -> Message:
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        message: Message = _decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError) as exc:
        raise WireError(f"malformed {_name_in(data)}: {exc}") from None
    return message


def _name_in(data: bytes | bytearray | memoryview) -> str:
    """Which message the sender meant, for the error text."""
    try:
        loose: Any = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError):
        return "message"
    name = loose.get("type") if isinstance(loose, dict) else None
    if isinstance(name, str):
        return name if name in MESSAGES else f"message of unknown type {name[:40]!r}"
    return "message"
