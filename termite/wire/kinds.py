"""What a frame can be, what answers a request, and what bounds a connection.

Shared by the parts of `wire/rpc.py`; holds no behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from termite.wire.bodies import Body
from termite.wire.framing import BARE
from termite.wire.messages import Message

# Kinds of frames.  A stream is a number the caller chose for its call; both directions use it.
REQUEST: Final = 1
REQUEST_WITH_BODY: Final = 2  # pieces follow
REQUEST_PIECE: Final = 3
REQUEST_LAST: Final = 4  # the last piece
REPLY: Final = 5  # after REPLY_WITH_BODY: the failure that ends the body early
REPLY_WITH_BODY: Final = 6
REPLY_PIECE: Final = 7
REPLY_LAST: Final = 8
NOTIFY: Final = 9
PART: Final = 10  # the beginning of a message longer than a frame; the next message frame goes on with it
FORGET: Final = 11  # the caller does not care any more
PING: Final = 12
PONG: Final = 13
GOODBYE: Final = 14  # the reason, as text
CONTENTS_PIECE: Final = 15 | BARE  # as REPLY_PIECE; whoever asked compares what it is made of with hashes
CONTENTS_LAST: Final = 16 | BARE

INLINE_BYTES = 64 * 1024
"""A body up to this length goes out together with its message; a longer one waits its turn."""


class Reply(NamedTuple):
    """`hashed`: all of the body is contents whose hashes stand in the message, or are known to whoever asked."""

    message: Message
    body: Body = b""
    hashed: bool = False


Result = Message | Reply


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may make us hold."""

    max_body_bytes: int = 64 * 1024 * 1024  # of one body that is gathered, not given to a sink
    max_held_bytes: int = 256 * 1024 * 1024  # of all bodies being gathered, in each direction
    max_serving: int = 4096  # calls of the peer at a time; one more is refused
    max_backlog_bytes: int = 256 * 1024 * 1024  # sent but not taken: a peer that does not read is lost


DEFAULT_LIMITS = Limits()
